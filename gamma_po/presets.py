"""Ready-made pairs of a loss and a margin, under the names of their papers."""

from __future__ import annotations

from typing import NamedTuple

from gamma_po.errors import unknown_name
from gamma_po.losses import Loss, build_loss
from gamma_po.margins import Margin, build_margin


class Preset(NamedTuple):
    """A method: what is minimised, and how much margin is asked of each pair."""

    loss: Loss
    margin: Margin
    source: str


def _gamma_simpo(model: str, *, beta: float, gamma_beta_ratio: float, tau: float) -> Preset:
    """γ-SimPO as published, where γ0 is stated divided by β."""
    margin = build_margin("kl", gamma0=beta * gamma_beta_ratio, tau=tau, center=False)
    return Preset(build_loss("simpo", beta=beta), margin, f"γ-PO, arXiv 2506.03690: {model}")


_GAMMA_SIMPO_LLAMA = _gamma_simpo("Llama-3-8B-Instruct", beta=10.0, gamma_beta_ratio=0.4, tau=10.0)

PRESETS: dict[str, Preset] = {
    "gamma_dpo": Preset(
        build_loss("dpo", beta=0.1),
        build_margin("kl", gamma0=1.0, tau=1.0, center=True),
        "γ-PO, arXiv 2506.03690; β of DPO, γ0 and τ this project's defaults",
    ),
    "gamma_simpo": _GAMMA_SIMPO_LLAMA,
    "gamma_simpo_llama": _GAMMA_SIMPO_LLAMA,
    "gamma_simpo_mistral": _gamma_simpo("Mistral-7B-Instruct-v0.2", beta=2.5, gamma_beta_ratio=0.15, tau=10.0),
    "gamma_simpo_gemma": _gamma_simpo("Gemma-2-9B-it", beta=10.0, gamma_beta_ratio=0.5, tau=20.0),
    "gamma_simpo_qwen": _gamma_simpo("Qwen2.5-7B-Instruct", beta=10.0, gamma_beta_ratio=0.3, tau=3.0),
    "simpo": Preset(
        build_loss("simpo", beta=2.5),
        build_margin("fixed", gamma=2.5 * 0.55),
        "SimPO, arXiv 2405.14734: Llama-3-8B-Instruct, γ/β = 0.55",
    ),
    "dpo": Preset(build_loss("dpo", beta=0.1), build_margin("none"), "DPO, arXiv 2305.18290"),
    "ipo": Preset(build_loss("ipo", beta=0.1), build_margin("none"), "IPO, arXiv 2310.12036"),
}


def preset(name: str) -> Preset:
    """Return the method of this name, ready for use.

    Args:
        name: one of PRESETS; `gamma_simpo` without a model is that of Llama-3.

    Returns:
        The loss, the margin bound to it, and where the settings come from. Both are immutable: use
        `dataclasses.replace` to vary an option.

    Raises:
        ConfigError: unknown name.

    >>> loss, margin, source = preset("gamma_simpo_qwen")
    >>> loss, margin.gamma0, margin.tau, margin.center
    (SimPO(beta=10.0), 3.0, 3.0, False)
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]

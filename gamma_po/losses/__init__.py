"""Preference losses, all with a per-pair target margin γ.

A loss is `loss(evidence, target_margin) -> [P]`. To add one: write a frozen dataclass with `rewards` and
`link` in the file of its family, and name it in LOSSES.
"""

from __future__ import annotations

from typing import Any

from gamma_po.errors import unknown_name
from gamma_po.losses.base import Loss, PairwiseLoss, gradient_weight
from gamma_po.losses.dpo import DPO, IPO
from gamma_po.losses.simpo import SimPO
from gamma_po.registry import build

LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "ipo": IPO,
    "simpo": SimPO,
}


def build_loss(name: str, **options: Any) -> Loss:
    """Build a loss from its registry name.

    Raises:
        ConfigError: unknown name, or an option that this loss does not use.

    >>> build_loss("dpo", beta=0.05)
    DPO(beta=0.05, label_smoothing=0.0)
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return build(LOSSES[name], name, options)


__all__ = ["DPO", "IPO", "LOSSES", "Loss", "PairwiseLoss", "SimPO", "build_loss", "gradient_weight"]

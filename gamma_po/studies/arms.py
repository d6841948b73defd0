"""The arms of the plug-and-play protocol (P1): what is compared with what, by preset.

One β and one learning rate for all arms, as for a user who adds γ to a working recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gamma_po.losses import DPO, IPO, KTOPair, Loss, RobustDPO, SimPO
from gamma_po.margins import KL, Fixed, Map, Margin, NoMargin, Reverse, Shuffled
from gamma_po.margins.maps import ClippedLinear, Exp, Linear, Piecewise, Power, Sigmoid, Softplus
from gamma_po.studies.settings import Setting

MAP_BUDGET = 0.5  # mean γ of every map, reward units
NARROW, WIDE = 0.2, 0.6  # sd of the KL margin's γ at 20 % flips with γ0/τ = 1 and 4, reward units
MAP_SHAPES = {
    "linear": Linear(), "clipped": ClippedLinear(), "piecewise": Piecewise(), "softplus": Softplus(),
    "sigmoid": Sigmoid(), "power": Power(), "exp": Exp(),
}  # fmt: skip


class Arm(NamedTuple):
    """A setting and what it is compared with."""

    setting: Setting
    against: tuple[str, ...] = ()
    control: str | None = None  # name of a matched-slope control to be fitted to this arm


Arms = Callable[[float, float, float], list[Arm]]  # β, learning rate, flip rate -> arms


def _arm(
    name: str,
    loss: Loss,
    margin: Margin,
    *against: str,
    rate: float,
    flips: float,
    control: str | None = None,
) -> Arm:
    setting = Setting(arm=name, loss=loss, margin=margin, learning_rate=rate, flip_rate=flips)
    return Arm(setting, against, control)


def base_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """DPO, γ = 0, and the oracle that leaves flipped pairs out."""
    same = {"learning_rate": rate, "flip_rate": flips, "loss": DPO(beta=beta)}
    return [
        Arm(Setting(arm="dpo", **same)),
        Arm(Setting(arm="dpo, γ=0", margin=Fixed(gamma=0.0), **same)),
        Arm(Setting(arm="oracle: no flipped pairs", mask="flipped", **same), ("dpo",)),
    ]


def kl_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """The KL margin centred and absolute, with fixed, reversed and shuffled controls."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    centred, absolute = KL(center=True), KL(center=False)
    return [
        _arm("fixed γ0", dpo, Fixed(gamma=absolute.gamma0), "dpo", **at),
        _arm("kl", dpo, centred, "dpo", "kl shuffled", "kl, matched slope", control="kl, matched slope", **at),
        _arm("kl reversed", dpo, Reverse(inner=centred), "dpo", **at),
        _arm("kl shuffled", dpo, Shuffled(inner=centred), "dpo", **at),
        _arm(
            "kl absolute", dpo, absolute, "dpo", "fixed γ0", "kl absolute shuffled", "kl absolute, matched slope",
            control="kl absolute, matched slope", **at,
        ),
        _arm("kl absolute reversed", dpo, Reverse(inner=absolute), "fixed γ0", **at),
        _arm("kl absolute shuffled", dpo, Shuffled(inner=absolute), "fixed γ0", **at),
    ]  # fmt: skip


def map_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """The offline map of the reference margin: full, fixed at its mean, reversed, shuffled (none is `dpo`)."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    full, control = Map(budget=MAP_BUDGET), "map, matched slope"
    return [
        _arm("map", dpo, full, "dpo", "map fixed", "map shuffled", control, control=control, **at),
        _arm("map fixed", dpo, Fixed(gamma=MAP_BUDGET), "dpo", **at),
        _arm("map reversed", dpo, Reverse(inner=full), "dpo", "map fixed", **at),
        _arm("map shuffled", dpo, Shuffled(inner=full), "map fixed", **at),
    ]


def noise_aware_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """Losses that are told the flip rate."""
    at = {"rate": rate, "flips": flips}
    return [
        _arm("robust_dpo, ε known", RobustDPO(beta=beta, label_smoothing=flips), NoMargin(), "dpo", **at),
        _arm("cdpo, ε known", DPO(beta=beta, label_smoothing=flips), NoMargin(), "dpo", **at),
    ]


def other_loss_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """The KL margin on IPO and on SimPO (whose answers have length 1 here, so h = β log π_w/π_l)."""
    at, simpo, control = {"rate": rate, "flips": flips}, SimPO(beta=beta), "γ-simpo, matched slope"
    return [
        _arm("ipo", IPO(beta=beta), NoMargin(), "dpo", **at),
        _arm("γ-ipo", IPO(beta=beta), KL(center=True), "ipo", **at),
        _arm("simpo", simpo, Fixed(gamma=1.0), "dpo", **at),
        _arm("γ-simpo", simpo, KL(center=False), "simpo", "γ-simpo shuffled", control, control=control, **at),
        _arm("γ-simpo reversed", simpo, Reverse(inner=KL(center=False)), "simpo", **at),
        _arm("γ-simpo shuffled", simpo, Shuffled(inner=KL(center=False)), "simpo", **at),
    ]


def kto_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """KTO on pairs, with and without the KL margin."""
    at, kto = {"rate": rate, "flips": flips}, KTOPair(beta=beta)
    return [
        _arm("kto", kto, NoMargin(), "dpo", **at),
        _arm("γ-kto", kto, KL(center=True), "kto", **at),
    ]


def online_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """γ from the policy's own reward margin (KL), or from the frozen reference's (maps): narrow and wide, mean γ0."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    fixed, narrow, wide = "fixed γ0", "online, narrow: kl γ0/τ=1", "online, wide: kl γ0/τ=4"
    mild, strong = (Map(shape=Linear(g0=1.0, k=k), standardize="z", budget=1.0) for k in (NARROW, WIDE))
    return [
        _arm(fixed, dpo, Fixed(gamma=1.0), "dpo", **at),
        _arm(narrow, dpo, KL(center=False), "dpo", fixed, **at),
        _arm(wide, dpo, KL(tau=0.25, center=False), "dpo", fixed, **at),
        _arm("reference, narrow: linear map", dpo, mild, "dpo", fixed, narrow, **at),
        _arm("reference, wide: linear map", dpo, strong, "dpo", fixed, wide, **at),
    ]


def shape_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """All map shapes at equal mean γ; to stand beside `map_arms`, whose `map fixed` they are compared with."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    arms = [
        _arm(f"map {name}", dpo, Map(shape=shape, budget=MAP_BUDGET), "dpo", "map fixed", **at)
        for name, shape in MAP_SHAPES.items()
    ]
    quantile = Map(shape=Power(k=1.0, threshold=0.0, p=2.0), standardize="quantile", budget=MAP_BUDGET)
    return [*arms, _arm("map quantile", dpo, quantile, "dpo", "map fixed", **at)]


def strength_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """The KL margin, centred, over a grid of γ0 and τ."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    grid = [(gamma0, tau) for gamma0 in (0.25, 0.5, 1.0, 2.0, 4.0) for tau in (0.5, 1.0, 2.0, 4.0, 8.0)]
    return [_arm(f"kl γ0={g:g} τ={t:g}", dpo, KL(gamma0=g, tau=t, center=True), "dpo", **at) for g, t in grid]


def history_arms(beta: float, rate: float, flips: float) -> list[Arm]:
    """The KL margin with longer and shorter histories."""
    dpo, at = DPO(beta=beta), {"rate": rate, "flips": flips}
    kept = "kl history=256"
    return [
        _arm(f"kl history={n}", dpo, KL(center=True, history=n), *(("dpo",) if n == 256 else ("dpo", kept)), **at)
        for n in (0, 64, 256, 1024, 4096)
    ]


def together(*parts: Arms) -> Arms:
    """The arms of several lists; an arm named twice is taken once."""

    def arms(beta: float, rate: float, flips: float) -> list[Arm]:
        found: dict[str, Arm] = {}
        for part in parts:
            for arm in part(beta, rate, flips):
                found.setdefault(arm.setting.arm, arm)
        return list(found.values())

    return arms


def told_rate(arms: Arms) -> Arms:
    """Leave out what needs a flip rate above 0 where there are no flips: it is the base loss there."""

    def kept(beta: float, rate: float, flips: float) -> list[Arm]:
        return arms(beta, rate, flips) if flips > 0 else []

    return kept


ALL_ARMS = together(base_arms, kl_arms, map_arms, told_rate(noise_aware_arms), other_loss_arms)

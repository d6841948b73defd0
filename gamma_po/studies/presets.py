"""Studies by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gamma_po.errors import ConfigError
from gamma_po.studies.arms import (
    ALL_ARMS,
    Arms,
    base_arms,
    history_arms,
    kl_arms,
    kto_arms,
    map_arms,
    noise_aware_arms,
    online_arms,
    other_loss_arms,
    shape_arms,
    strength_arms,
    together,
    told_rate,
)
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.calibration import Calibrated
from gamma_po.studies.challenge import Challenge
from gamma_po.studies.methods import METHODS
from gamma_po.studies.plug_and_play import PlugAndPlay
from gamma_po.studies.running import Testbed
from gamma_po.studies.tuned import Tuned

BETA_CURVE = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CORE_METHODS = ("dpo", "fixed", "kl", "kl absolute", "kl shuffled", "map", "robust_dpo", "oracle: no flipped pairs")
MIDDLE = (0.5,)
NOISE = (0.0, 0.2, 0.4)

ELSEWHERE = {"overhead": "what γ costs per step; no study: python experiments/benchmarks/overhead.py"}

Protocol = PlugAndPlay | Tuned | Calibrated | Challenge
Build = Callable[[Testbed], Protocol]


def _plug(arms: Arms, count: int, **options: Any) -> Build:
    return lambda testbed: PlugAndPlay(testbed=testbed, arms=arms, seeds=tuple(range(count)), **options)


def _tuned(names: tuple[str, ...], count: int, **options: Any) -> Build:
    return lambda testbed: Tuned(testbed=testbed, methods=names, seeds=tuple(range(count)), **options)


def _calibrated(count: int, pairs: int) -> Build:
    def build(testbed: Testbed) -> Calibrated:
        own = dataclasses.replace(_bandit(testbed, "calibrate"), calibration=pairs)
        return Calibrated(testbed=own, seeds=tuple(range(count)))

    return build


def _challenge(testbed: Testbed) -> Challenge:
    return Challenge(testbed=_bandit(testbed, "challenge"), seeds=tuple(range(20)))


def _bandit(testbed: Testbed, preset: str) -> Bandit:
    """Refuse what the preset cannot draw further or clean pairs from."""
    if not isinstance(testbed, Bandit):
        raise ConfigError(f"the preset {preset!r} is one of `study bandit`")
    return testbed


PRESETS: dict[str, tuple[str, Build]] = {
    "p1": (
        "plug-and-play, all arms and controls, three references, flips 0, 0.2, 0.4",
        _plug(ALL_ARMS, 20, beta_curve=BETA_CURVE),
    ),
    "p2": (
        "every method tuned with the same budget on seeds of its own, compared at KL 1",
        _tuned(tuple(METHODS), 30),
    ),
    "p2_core": ("p2 with eight methods and one reference", _tuned(CORE_METHODS, 20, rhos=MIDDLE)),
    "p2_maps": (
        "p2 with the maps of the reference's margin, steep and linear, and one reference",
        _tuned(("dpo", "map", "linear map", "oracle: no flipped pairs"), 20, rhos=MIDDLE),
    ),
    "main": (
        "DPO, SimPO, IPO and KTO with and without γ",
        _plug(together(base_arms, kl_arms, other_loss_arms, kto_arms), 20),
    ),
    "direction": (
        "full, fixed, none, reverse, shuffled, for the KL margin and the map",
        _plug(together(base_arms, kl_arms, map_arms), 20),
    ),
    "shapes": ("map shapes at equal mean γ", _plug(together(base_arms, map_arms, shape_arms), 20)),
    "strength": (
        "γ0 × τ: phase diagram",
        _plug(together(base_arms, kl_arms, strength_arms), 10, rhos=MIDDLE),
    ),
    "noise": (
        "flips from 0 to 0.4",
        _plug(
            together(base_arms, kl_arms, map_arms, told_rate(noise_aware_arms)), 20,
            rhos=MIDDLE, flips=(0.0, 0.1, 0.2, 0.3, 0.4),
        ),
    ),
    "reference": (
        "how informative the reference is",
        _plug(together(base_arms, kl_arms, map_arms), 20, rhos=(0.0, 0.25, 0.5, 0.75, 0.9), flips=(0.2,)),
    ),
    "online": (
        "γ from the policy's own margins (KL) or from the fixed reference's (maps): equal mean γ, like widths",
        _plug(together(base_arms, online_arms), 20),
    ),
    "history": (
        "how long the KL margin's history is",
        _plug(together(base_arms, kl_arms, history_arms), 20, rhos=MIDDLE),
    ),
    "calibrate": (
        "the map's strength and sign chosen on 300 clean or 3000 noisy held-out pairs",
        _calibrated(20, 3000),
    ),
    "challenge": (
        "what 40 % flips leave to be had: brackets, and candidates without clean labels",
        _challenge,
    ),
    "small": (
        "half a minute at most: few arms, four seeds, one reference",
        _plug(
            together(base_arms, kl_arms, map_arms), 4,
            rhos=MIDDLE, flips=(0.0, 0.4), beta_curve=(0.02, 0.1, 0.5), kls=(1.0, 0.25),
        ),
    ),
}  # fmt: skip

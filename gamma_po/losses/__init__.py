"""Preference losses, all with a per-pair target margin γ.

A loss is `loss(evidence, target_margin) -> [P]`. To add one: write a frozen dataclass with `rewards` and
`link` in the file of its family, and name it in LOSSES.
"""

from __future__ import annotations

from typing import Any

from gamma_po.errors import unknown_name
from gamma_po.losses.base import Loss, PairwiseLoss, TwoSidedLoss, gradient_weight, require_margin_fits
from gamma_po.losses.combined import SFT, WeightedSum
from gamma_po.losses.dpo import DPO, DPOP, RDPO, DPONorm, RobustDPO
from gamma_po.losses.dynamic_beta import BetaDPO
from gamma_po.losses.log_ratio import IPO, DiscoPOP, EXOPair, Hinge
from gamma_po.losses.reference_free import CPO, ORPO, SimPO
from gamma_po.losses.transport import AOT, AOTUnpaired
from gamma_po.losses.two_sided import APODown, APOZero, BCOPair, KTOPair, NCAPair, SPPOHard
from gamma_po.losses.wrapped import FDPO, LDDPO, WPO, WithSFT
from gamma_po.registry import build

LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "robust_dpo": RobustDPO,
    "simpo": SimPO,
    "dpo_norm": DPONorm,
    "ipo": IPO,
    "hinge": Hinge,
    "kto_pair": KTOPair,
    "cpo": CPO,
    "orpo": ORPO,
    "rdpo": RDPO,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "discopop": DiscoPOP,
    "dpop": DPOP,
    "f_dpo": FDPO,
    "ld_dpo": LDDPO,
    "beta_dpo": BetaDPO,
    "wpo": WPO,
    "sft": SFT,
    "with_sft": WithSFT,
    "weighted_sum": WeightedSum,
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


__all__ = [
    "AOT",
    "CPO",
    "DPO",
    "DPOP",
    "FDPO",
    "IPO",
    "LDDPO",
    "LOSSES",
    "ORPO",
    "RDPO",
    "SFT",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCOPair",
    "BetaDPO",
    "DPONorm",
    "DiscoPOP",
    "EXOPair",
    "Hinge",
    "KTOPair",
    "Loss",
    "NCAPair",
    "PairwiseLoss",
    "RobustDPO",
    "SPPOHard",
    "SimPO",
    "TwoSidedLoss",
    "WeightedSum",
    "WithSFT",
    "build_loss",
    "gradient_weight",
    "require_margin_fits",
]

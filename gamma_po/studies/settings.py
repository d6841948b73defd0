"""One setting of a study: which loss, margin, learning rate and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gamma_po.errors import ConfigError, require
from gamma_po.losses import DPO, KTOPair, Loss, PairwiseLoss
from gamma_po.margins import KL, Fixed, Map, Margin, NoMargin, Reverse, Shuffled
from gamma_po.types import Evidence, PairLogps

STATIC = (NoMargin, Fixed, Map)  # γ known before training


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the batched program is given, beside its world.

    Args:
        arm: name in the tables.
        loss: a function of the reward margin alone, see `require_pairwise`; or KTO's, see `needs_normaliser`.
        margin: none, fixed, kl, map, or reverse or shuffled of these.
        learning_rate: of Adam at its peak, > 0.
        flip_rate: share of labels flipped, in [0, 0.5).
        mask: "flipped" is the oracle that leaves the flipped pairs out.
    """

    arm: str
    loss: Loss = field(default_factory=DPO)
    margin: Margin = field(default_factory=NoMargin)
    learning_rate: float = 0.01
    flip_rate: float = 0.0
    mask: Literal["none", "flipped"] = "none"

    def __post_init__(self) -> None:
        """Check what this testbed can do."""
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number > 0")
        require(0 <= self.flip_rate < 0.5, "flip_rate", self.flip_rate, "0 <= rate < 0.5")
        require(self.mask in ("none", "flipped"), "mask", self.mask, "none, flipped")
        if not needs_normaliser(self.loss):
            require_pairwise(self.loss)
        allowed = f"none with {self.loss.name}, whose K is a mean over all pairs of the batch"
        require(self.mask == "none" or not needs_normaliser(self.loss), "mask", self.mask, allowed)
        if not isinstance(core(self.margin), (*STATIC, KL)):
            raise ConfigError(
                f"{self.arm}: the margin {self.margin.name!r} is not known to the bandit; allowed: none, fixed, kl, "
                "map, and reverse or shuffled of these"
            )

    @property
    def is_static(self) -> bool:
        """Whether γ is known before training."""
        return isinstance(core(self.margin), STATIC)


def core(margin: Margin) -> Margin:
    """The margin inside of `reverse` and `shuffled`."""
    return margin.inner if isinstance(margin, Reverse | Shuffled) else margin


def needs_normaliser(loss: Loss) -> bool:
    """Whether a loss judges each response on its own, so that log Z(x) of the policy does not cancel in it."""
    return isinstance(loss, KTOPair)


def require_pairwise(loss: Loss) -> None:
    """Refuse a loss that does not depend on the difference of the two log-ratios alone.

    The bandit's policy is known up to its normaliser, log π(y|x) = log π_ref(y|x) + f(x, y) - log Z(x), which
    cancels in differences only.

    Raises:
        ConfigError: naming the loss.
    """
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    reference = PairLogps(zero, zero, one, one)
    here, there = (PairLogps(zero + 1 + shift, zero + shift, one, one) for shift in (0.0, -3.0))
    same = isinstance(loss, PairwiseLoss) and torch.allclose(
        loss(Evidence(here, reference), zero), loss(Evidence(there, reference), zero), rtol=1e-9
    )
    if not same:
        raise ConfigError(
            f"the loss {loss.name!r} is not allowed in a bandit study: it depends on more than the difference of "
            "chosen and rejected; allowed: dpo, robust_dpo, simpo, dpo_norm, ipo, hinge, rdpo, exo_pair, discopop, "
            "kto_pair"
        )

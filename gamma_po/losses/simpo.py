"""Losses without a reference: SimPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gamma_po import links, rewards
from gamma_po.errors import require
from gamma_po.losses.base import PairwiseLoss
from gamma_po.types import Evidence, PairRewards


@dataclass(frozen=True, kw_only=True)
class SimPO(PairwiseLoss):
    """Simple preference optimization: ℓ(h - γ), h = β (a/n_w - b/n_l).

    With the fixed margin γ0 this is SimPO itself; its paper states γ0/β.

    Args:
        beta: reward units per nat per token, > 0.

    Source:
        arXiv 2405.14734, eq. 6.
    """

    name: ClassVar[str] = "simpo"
    formula: ClassVar[str] = "ℓ(h-γ), h = β (a/n_w - b/n_l)"
    source: ClassVar[str] = "arXiv 2405.14734"
    needs_reference: ClassVar[bool] = False
    centers_kl: ClassVar[bool] = False

    beta: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.beta > 0, "simpo.beta", self.beta, "a number > 0")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β log π per token."""
        return rewards.mean_logp_rewards(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic."""
        return links.logistic(reward_margin, target_margin)

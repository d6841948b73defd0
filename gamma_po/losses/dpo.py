"""Losses on log-ratio rewards: DPO and IPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gamma_po import links, rewards
from gamma_po.errors import require
from gamma_po.losses.base import PairwiseLoss
from gamma_po.types import Evidence, PairRewards


@dataclass(frozen=True, kw_only=True)
class DPO(PairwiseLoss):
    """Direct preference optimization: (1 - ε) ℓ(h - γ) + ε ℓ(-(h - γ)), h = β (r_w - r_l).

    Args:
        beta: reward units per nat, > 0.
        label_smoothing: ε in [0, 0.5), the share of labels assumed wrong (cDPO).

    Source:
        arXiv 2305.18290, eq. 7; label smoothing: Mitchell (2023).
    """

    name: ClassVar[str] = "dpo"
    formula: ClassVar[str] = "(1-ε) ℓ(h-γ) + ε ℓ(-(h-γ)), h = β (r_w - r_l)"
    source: ClassVar[str] = "arXiv 2305.18290; ε: Mitchell 2023"

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.beta > 0, "dpo.beta", self.beta, "a number > 0")
        require(0 <= self.label_smoothing < 0.5, "dpo.label_smoothing", self.label_smoothing, "0 <= ε < 0.5")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β (log π - log π_ref)."""
        return rewards.log_ratio_rewards(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic, with label smoothing."""
        return links.logistic(reward_margin, target_margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class IPO(PairwiseLoss):
    """Identity preference optimization: (d - 1/(2β) - γ/β)², d = r_w/n_w - r_l/n_l or r_w - r_l.

    In reward units, h = β d, this is ((h - γ - 1/2) / β)².

    Args:
        beta: reward units per nat, > 0; 1/(2β) is the log-ratio gap that IPO aims for without a margin.
        length_norm: divide log-ratios by token counts, as its authors do.

    Source:
        arXiv 2310.12036, eq. 17.
    """

    name: ClassVar[str] = "ipo"
    formula: ClassVar[str] = "(d - 1/(2β) - γ/β)², d = r_w/n_w - r_l/n_l (length_norm) or r_w - r_l"
    source: ClassVar[str] = "arXiv 2310.12036"

    beta: float = 0.1
    length_norm: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.beta > 0, "ipo.beta", self.beta, "a number > 0")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β (log π - log π_ref), per token if `length_norm`."""
        reward = rewards.mean_log_ratio_rewards if self.length_norm else rewards.log_ratio_rewards
        return reward(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Squared distance to the target, in nats."""
        return links.squared((reward_margin - target_margin) / self.beta, target_margin.new_tensor(0.5 / self.beta))

"""The DPO family: logistic losses on log-ratio rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po import links, rewards
from gamma_po.losses.base import (
    LogRatioRewards,
    PairwiseLoss,
    require_not_negative,
    require_positive,
    require_smoothing,
)
from gamma_po.types import Evidence, PairRewards


@dataclass(frozen=True, kw_only=True)
class DPO(LogRatioRewards, PairwiseLoss):
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
        super().__post_init__()
        require_smoothing(self, self.label_smoothing)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic, with label smoothing."""
        return links.logistic(reward_margin, target_margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class RobustDPO(LogRatioRewards, PairwiseLoss):
    """Robust DPO: [(1 - ε) ℓ(h - γ) - ε ℓ(-(h - γ))] / (1 - 2ε), unbiased under a share ε of flipped labels.

    Args:
        beta: reward units per nat, > 0.
        label_smoothing: ε in [0, 0.5), the share of labels that are flipped.

    Source:
        arXiv 2403.00409, the robust DPO loss.
    """

    name: ClassVar[str] = "robust_dpo"
    formula: ClassVar[str] = "[(1-ε) ℓ(h-γ) - ε ℓ(-(h-γ))] / (1-2ε), h = β (r_w - r_l)"
    source: ClassVar[str] = "arXiv 2403.00409"

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require_smoothing(self, self.label_smoothing)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic, corrected for flips."""
        return links.robust_logistic(reward_margin, target_margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DPONorm(PairwiseLoss):
    """Length-normalised DPO: ℓ(h - γ), h = β (r_w/n_w - r_l/n_l).

    Args:
        beta: reward units per nat per token, > 0.

    Source:
        Tülu 3, arXiv 2411.15124.
    """

    name: ClassVar[str] = "dpo_norm"
    formula: ClassVar[str] = "ℓ(h-γ), h = β (r_w/n_w - r_l/n_l)"
    source: ClassVar[str] = "Tülu 3, arXiv 2411.15124"

    beta: float = 5.0

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "beta")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β (log π - log π_ref) per token."""
        return rewards.mean_log_ratio_rewards(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic."""
        return links.logistic(reward_margin, target_margin)


@dataclass(frozen=True, kw_only=True)
class RDPO(LogRatioRewards, PairwiseLoss):
    """Length-regularised DPO: ℓ(h + α (n_w - n_l) - γ), h = β (r_w - r_l).

    A chosen completion that is longer has part of its margin as a gift, so it is pushed less.

    Args:
        beta: reward units per nat, > 0.
        alpha: α, reward units per token, >= 0.

    Source:
        R-DPO, arXiv 2403.19159, the length-regularised objective.
    """

    name: ClassVar[str] = "rdpo"
    formula: ClassVar[str] = "ℓ(h + α (n_w - n_l) - γ), h = β (r_w - r_l)"
    source: ClassVar[str] = "R-DPO, arXiv 2403.19159"

    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require_not_negative(self, "alpha")

    def reward_margin(self, evidence: Evidence) -> Tensor:
        """The reward margin and what the longer chosen completion is given."""
        margin, policy = self.rewards(evidence).margin, evidence.policy
        longer = policy.chosen_length - policy.rejected_length
        return margin + self.alpha * longer.to(margin.dtype)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic."""
        return links.logistic(reward_margin, target_margin)


@dataclass(frozen=True, kw_only=True)
class DPOP(LogRatioRewards, PairwiseLoss):
    """DPO-Positive: ℓ(h - βλ max(0, -r_w) - γ), h = β (r_w - r_l).

    The penalty keeps the chosen completion from becoming less likely than under the reference.

    Args:
        beta: reward units per nat, > 0.
        penalty: λ >= 0, weight of the lost likelihood of chosen completions.

    Source:
        DPO-Positive (Smaug), arXiv 2402.13228, the DPOP loss.
    """

    name: ClassVar[str] = "dpop"
    formula: ClassVar[str] = "ℓ(h - βλ max(0, -r_w) - γ), h = β (r_w - r_l)"
    source: ClassVar[str] = "DPO-Positive, arXiv 2402.13228"

    beta: float = 0.3
    penalty: float = 50.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require_not_negative(self, "penalty")

    def reward_margin(self, evidence: Evidence) -> Tensor:
        """The reward margin minus λ times what the chosen reward has fallen below zero."""
        pair = self.rewards(evidence)
        return pair.margin - self.penalty * torch.relu(-pair.chosen)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic."""
        return links.logistic(reward_margin, target_margin)

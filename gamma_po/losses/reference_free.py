"""Losses without a reference: SimPO, CPO and ORPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gamma_po import links, rewards
from gamma_po.losses.base import Loss, PairwiseLoss, require_not_negative, require_positive
from gamma_po.ranks import Ranks
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
        require_positive(self, "beta")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β log π per token."""
        return rewards.mean_logp_rewards(evidence, self.beta)

    def link(self, reward_margin: Tensor, target_margin: Tensor) -> Tensor:
        """Logistic."""
        return links.logistic(reward_margin, target_margin)


@dataclass(frozen=True, kw_only=True)
class CPO(Loss):
    """Contrastive preference optimization: ℓ(h - γ) - λ a/n_w, h = β (a - b).

    Args:
        beta: reward units per nat, > 0.
        sft_weight: λ >= 0, weight of the chosen completion's negative log-likelihood per token.

    Source:
        arXiv 2401.08417: the contrastive loss and the likelihood term added to it, here per pair, see `SFT`.
    """

    name: ClassVar[str] = "cpo"
    formula: ClassVar[str] = "ℓ(h-γ) - λ a/n_w, h = β (a - b)"
    source: ClassVar[str] = "arXiv 2401.08417"
    needs_reference: ClassVar[bool] = False
    centers_kl: ClassVar[bool] = False

    beta: float = 0.1
    sft_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "beta")
        require_not_negative(self, "sft_weight")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """β log π, summed."""
        return rewards.logp_rewards(evidence, self.beta)

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Logistic, and the likelihood of the chosen completion."""
        preference = links.logistic(self.rewards(evidence).margin, target_margin.detach())
        return preference - self.sft_weight * evidence.policy.mean_chosen


@dataclass(frozen=True, kw_only=True)
class ORPO(Loss):
    """Odds ratio preference optimization: -a/n_w + λ ℓ(h - γ), h = logodds_w - logodds_l.

    The odds are those of the geometric mean token probability; as a reward they have β = 1.

    Args:
        odds_ratio_weight: λ > 0, weight of the odds-ratio term.

    Source:
        arXiv 2403.07691, eqs. 4 and 7; the likelihood term here is per pair, see `SFT`.
    """

    name: ClassVar[str] = "orpo"
    formula: ClassVar[str] = "-a/n_w + λ ℓ(h-γ), h = logodds(a/n_w) - logodds(b/n_l)"
    source: ClassVar[str] = "arXiv 2403.07691"
    needs_reference: ClassVar[bool] = False
    centers_kl: ClassVar[bool] = False

    odds_ratio_weight: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "odds_ratio_weight")

    def rewards(self, evidence: Evidence) -> PairRewards:
        """Log-odds per token."""
        return rewards.log_odds_rewards(evidence)

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """The likelihood of the chosen completion, and the logistic loss of the odds ratio."""
        preference = links.logistic(self.rewards(evidence).margin, target_margin.detach())
        return self.odds_ratio_weight * preference - evidence.policy.mean_chosen

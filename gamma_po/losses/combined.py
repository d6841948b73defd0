"""Losses made of losses: weighted sums (MPO), and the likelihood term that may join any loss (RPO)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po import rewards
from gamma_po.errors import require
from gamma_po.losses.base import Loss, require_positive
from gamma_po.losses.dpo import DPO
from gamma_po.losses.two_sided import BCOPair
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence, PairRewards


@dataclass(frozen=True, kw_only=True)
class SFT(Loss):
    """Negative log-likelihood of the chosen completion per token: -a/n_w.

    Every pair counts alike, however long: not the mean over all tokens of the batch. It compares nothing, so it
    takes no margin.

    Source:
        the likelihood term of RPO, arXiv 2404.19733.
    """

    name: ClassVar[str] = "sft"
    formula: ClassVar[str] = "-a/n_w"
    source: ClassVar[str] = "maximum likelihood"
    needs_reference: ClassVar[bool] = False
    centers_kl: ClassVar[bool] = False
    takes_margin: ClassVar[bool] = False

    def rewards(self, evidence: Evidence) -> PairRewards:
        """log π per token."""
        return rewards.mean_logp_rewards(evidence, 1.0)

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """-a/n_w; a margin other than `none` is refused by `require_margin_fits`."""
        return -evidence.policy.mean_chosen


@dataclass(frozen=True, kw_only=True)
class WithSFT(Loss):
    """Any loss plus λ times the chosen completion's negative log-likelihood per token: loss - λ a/n_w.

    Args:
        loss: the preference loss; its rewards are the rewards.
        sft_weight: λ > 0.

    Source:
        RPO, arXiv 2404.19733, its loss with DPO.
    """

    name: ClassVar[str] = "with_sft"
    formula: ClassVar[str] = "loss - λ a/n_w"
    source: ClassVar[str] = "RPO, arXiv 2404.19733"

    loss: Loss
    sft_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "sft_weight")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As the loss."""
        return self.loss.needs_reference

    @property
    def centers_kl(self) -> bool:  # type: ignore[override]
        """As the loss."""
        return self.loss.centers_kl

    @property
    def takes_margin(self) -> bool:  # type: ignore[override]
        """As the loss."""
        return self.loss.takes_margin

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """As the loss."""
        return self.loss.couples_pairs

    def rewards(self, evidence: Evidence) -> PairRewards:
        """The loss's rewards."""
        return self.loss.rewards(evidence)

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """The loss and the likelihood of the chosen completion."""
        return self.loss(evidence, target_margin, ranks) - self.sft_weight * evidence.policy.mean_chosen


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Loss):
    """Weighted sum of losses: Σ_k w_k loss_k(γ). The default is MPO: 0.8 DPO + 0.2 BCO + 1.0 SFT.

    γ is the same number of reward units in every loss that takes a margin. Rewards, and with them the KL margin,
    are those of the first loss.

    Args:
        losses: at least one; if any takes a margin, the first must.
        weights: w_k > 0, one for each loss.

    Source:
        MPO, arXiv 2411.10442: preference, quality and generation loss.
    """

    name: ClassVar[str] = "weighted_sum"
    formula: ClassVar[str] = "Σ_k w_k loss_k"
    source: ClassVar[str] = "MPO, arXiv 2411.10442"

    losses: tuple[Loss, ...] = field(default_factory=lambda: (DPO(), BCOPair(), SFT()))
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)

    def __post_init__(self) -> None:
        """Check the options."""
        names = [loss.name for loss in self.losses]
        require(len(names) > 0, "weighted_sum.losses", names, "at least one loss")
        first_leads = self.losses[0].takes_margin or not self.takes_margin
        require(first_leads, "weighted_sum.losses", names, "a first loss that compares chosen and rejected")
        fits = len(self.weights) == len(names) and all(weight > 0 for weight in self.weights)
        require(fits, "weighted_sum.weights", self.weights, f"{len(names)} numbers > 0, one for each of {names}")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """If any loss does."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def centers_kl(self) -> bool:  # type: ignore[override]
        """As the first loss, whose rewards count."""
        return self.losses[0].centers_kl

    @property
    def takes_margin(self) -> bool:  # type: ignore[override]
        """If any loss does."""
        return any(loss.takes_margin for loss in self.losses)

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """If any loss does."""
        return any(loss.couples_pairs for loss in self.losses)

    def rewards(self, evidence: Evidence) -> PairRewards:
        """The first loss's rewards."""
        return self.losses[0].rewards(evidence)

    def __call__(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Add up."""
        parts = [loss(evidence, target_margin, ranks) for loss in self.losses]
        return (torch.stack(parts) * parts[0].new_tensor(self.weights)[:, None]).sum(dim=0)

"""Weighted sums of losses (MPO), and the likelihood that may be one of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po import rewards
from gamma_po.errors import require
from gamma_po.losses.base import Loss
from gamma_po.losses.dpo import DPO
from gamma_po.losses.two_sided import BCOPair
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence, PairRewards


def of_any(attribute: str) -> Any:
    """Return a property that is true if it is for any of the losses."""
    return property(lambda total: any(getattr(loss, attribute) for loss in total.losses))


def of_first(attribute: str) -> Any:
    """Return a property that is the first loss's, whose rewards count."""
    return property(lambda total: getattr(total.losses[0], attribute))


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

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """-a/n_w; a margin other than `none` is refused by `require_margin_fits`."""
        return -evidence.policy.mean_chosen


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Loss):
    """Weighted sum of losses: Σ_k w_k loss_k(γ). The default is MPO: 0.8 DPO + 0.2 BCO + 1.0 SFT.

    γ is the same number of reward units in every loss that takes a margin. Rewards, and with them the KL margin,
    are those of the first loss.

    Args:
        losses: at least one; if any takes a margin, the first must.
        weights: w_k > 0, one weight for each loss.

    Source:
        MPO, arXiv 2411.10442: preference, quality and generation loss.
    """

    name: ClassVar[str] = "weighted_sum"
    formula: ClassVar[str] = "Σ_k w_k loss_k"
    source: ClassVar[str] = "MPO, arXiv 2411.10442"

    needs_reference = of_any("needs_reference")
    centers_kl = of_first("centers_kl")
    takes_margin = of_any("takes_margin")
    couples_pairs = of_any("couples_pairs")
    matches_pairs = of_any("matches_pairs")
    needs_shared = of_any("needs_shared")
    needs_on_policy = of_any("needs_on_policy")
    reward_scale = of_first("reward_scale")
    beta_changes = of_first("beta_changes")

    losses: tuple[Loss, ...] = field(default_factory=lambda: (DPO(), BCOPair(), SFT()))
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)

    def __post_init__(self) -> None:
        """Check the options."""
        names = [loss.name for loss in self.losses]
        require(len(names) > 0, "weighted_sum.losses", names, "at least one loss")
        first_leads = self.losses[0].takes_margin or not self.takes_margin
        require(first_leads, "weighted_sum.losses", names, "a first loss that compares chosen and rejected")
        fits = len(self.weights) == len(names) and all(0 < weight < math.inf for weight in self.weights)
        require(
            fits, "weighted_sum.weights", self.weights, f"{len(names)} numbers > 0, one for each of {names}, all finite"
        )

    def init(self) -> tuple[Any, ...]:
        """Every loss's state."""
        return tuple(loss.init() for loss in self.losses)

    def step(self, evidence: Evidence, state: Any, ranks: Ranks | None = None) -> tuple[Loss, Any]:
        """Every loss's step."""
        steps = [loss.step(evidence, part, ranks) for loss, part in zip(self.losses, state, strict=True)]
        losses, states = zip(*steps, strict=True)
        return dataclasses.replace(self, losses=losses), states

    def report(self, state: Any) -> dict[str, Tensor]:
        """What the losses report, by their names; with their index where a name occurs more than once."""
        names = [loss.name for loss in self.losses]
        keys = [f"{name}/{k}" if names.count(name) > 1 else name for k, name in enumerate(names)]
        parts = zip(keys, self.losses, state, strict=True)
        return {f"{key}/{item}": value for key, loss, part in parts for item, value in loss.report(part).items()}

    def rewards(self, evidence: Evidence) -> PairRewards:
        """The first loss's rewards."""
        return self.losses[0].rewards(evidence)

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Add up."""
        parts = [loss(evidence, target_margin, ranks) for loss in self.losses]
        return (torch.stack(parts) * parts[0].new_tensor(self.weights)[:, None]).sum(dim=0)

"""Alignment via optimal transport: whole distributions are compared, so both sides are sorted before they are paired.

Sorting is over this micro-batch's pairs on all ranks: cutting a global batch into more micro-batches changes
which values meet, using more ranks does not. The loss of pair i is that of the match in which its chosen side stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po import links
from gamma_po.losses.base import LogRatioRewards, require_smoothing
from gamma_po.ranks import Gathered, Local, Ranks
from gamma_po.types import Evidence


@dataclass(frozen=True, kw_only=True)
class TransportLoss(LogRatioRewards):
    """What both variants share.

    Args:
        beta: reward units per nat, > 0.
        label_smoothing: ε in [0, 0.5), the share of labels assumed wrong.
    """

    source: ClassVar[str] = "AOT, arXiv 2406.05882"
    couples_pairs: ClassVar[bool] = True
    matches_pairs: ClassVar[bool] = True

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require_smoothing(self, self.label_smoothing)

    def of_match(self, better: Tensor, worse: Tensor) -> Tensor:
        """Logistic loss of matched values."""
        return links.logistic(better, worse, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AOT(TransportLoss):
    """Paired alignment via optimal transport: ℓ of sorted β (a - b) - γ against sorted β (a0 - b0).

    The policy's margins are asked to dominate the reference's as distributions; γ_i lowers the i-th policy margin
    before sorting.

    Args:
        beta, label_smoothing: see `TransportLoss`.

    Source:
        AOT, arXiv 2406.05882, paired, with the logistic loss.
    """

    name: ClassVar[str] = "aot"
    formula: ClassVar[str] = "(1-ε) ℓ(x) + ε ℓ(-x), x = sort(β (a-b) - γ) - sort(β (a0-b0))"

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Match by rank: the k-th policy margin with the k-th reference margin."""
        assert evidence.reference is not None  # checked by __call__
        ranks = ranks or Local()
        policy = self.beta * evidence.policy.margin - target_margin.detach()
        reference = self.beta * evidence.reference.margin.detach()
        match = matched(ranks.gather(policy), ranks.gather(reference).values, len(policy))
        return self.of_match(policy, match)


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(TransportLoss):
    """Unpaired alignment via optimal transport: ℓ of sorted chosen rewards against sorted rejected rewards.

    γ_i/2 is taken from the i-th chosen reward and added to the i-th rejected one before sorting.

    Args:
        beta, label_smoothing: see `TransportLoss`.

    Source:
        AOT, arXiv 2406.05882, unpaired, with the logistic loss.
    """

    name: ClassVar[str] = "aot_unpaired"
    formula: ClassVar[str] = "(1-ε) ℓ(x) + ε ℓ(-x), x = sort(β r_w - γ/2) - sort(β r_l + γ/2)"

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Match by rank: the k-th chosen reward with the k-th rejected reward.

        A match may span two ranks, so each rank gives its own completions their gradient: the chosen ones in the
        loss itself, the rejected ones by a term whose value is zero.
        """
        ranks, half = ranks or Local(), target_margin.detach() / 2
        pair = self.rewards(evidence)
        chosen, rejected = pair.chosen - half, pair.rejected + half
        all_chosen, all_rejected = ranks.gather(chosen), ranks.gather(rejected)
        count = len(half)
        of_chosen = self.of_match(chosen, matched(all_chosen, all_rejected.values, count))
        of_rejected = self.of_match(matched(all_rejected, all_chosen.values, count), rejected)
        return of_chosen + (of_rejected - of_rejected.detach())


def matched(mine: Gathered, others: Tensor, count: int) -> Tensor:
    """Return, for each of this rank's values, the other sample's value of the same rank order.

    Args:
        mine: [M], and where this rank's values begin; ties are ranked in their order.
        others: [M].
        count: how many values of `mine` are this rank's.

    Returns:
        [count].

    >>> matched(Gathered(torch.tensor([0.3, 0.1, 0.2]), 0), torch.tensor([7.0, 9.0, 8.0]), 3)
    tensor([9., 7., 8.])
    """
    match = torch.empty_like(others)
    match[mine.values.argsort(stable=True)] = others.sort().values
    return match[mine.start : mine.start + count]

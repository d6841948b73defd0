"""Losses that judge each completion on its own, on log-ratio rewards R = β r: γ/2 is asked of each side.

R_w stands for R_w - γ/2 and R_l for R_l + γ/2 in all formulas, so `loss(R_w, R_l, γ) = loss(R_w - γ/2, R_l + γ/2, 0)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gamma_po import links
from gamma_po.errors import require
from gamma_po.losses.base import TwoSidedLoss
from gamma_po.ranks import Ranks
from gamma_po.types import PairRewards

Shift = Literal["none", "batch"]


@dataclass(frozen=True, kw_only=True)
class KTOPair(TwoSidedLoss):
    """Kahneman-Tversky optimization of pairs: s(-(R_w - γ/2 - K_l)) + s(R_l + γ/2 - K_w).

    K_w = max(0, mean R_w) and K_l = max(0, mean R_l) estimate β KL(π ‖ π_ref) from the pairs of this micro-batch
    on all ranks, without graph. Cutting a global batch into more micro-batches changes K; using more ranks does not.

    Args:
        beta: reward units per nat, > 0.

    Source:
        arXiv 2402.01306, eq. 7; its KL comes from mismatched completions, here from the other side of the pairs.
    """

    name: ClassVar[str] = "kto_pair"
    formula: ClassVar[str] = "s(K_l - R_w + γ/2) + s(R_l - K_w + γ/2), R = β r, K = max(0, batch mean R)"
    source: ClassVar[str] = "KTO, arXiv 2402.01306"
    couples_pairs: ClassVar[bool] = True

    beta: float = 0.1

    def baseline(self, pair_rewards: PairRewards, ranks: Ranks) -> PairRewards:
        """Each side is measured from the other side's K."""
        k = torch.relu(_batch_mean(pair_rewards, ranks))
        return PairRewards(chosen=k[1], rejected=k[0])

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Sigmoid on both sides."""
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True, kw_only=True)
class NCAPair(TwoSidedLoss):
    """Noise contrastive alignment of a pair: ℓ(R_w) + ½ ℓ(-R_w) + ½ ℓ(-R_l).

    Not monotone in γ: it turns where 3 s(R_w - γ/2) - s(R_l + γ/2) = 2.

    Args:
        beta: reward units per nat, > 0.

    Source:
        NCA, arXiv 2402.05369, the loss for K = 2 with one preferred completion.
    """

    name: ClassVar[str] = "nca_pair"
    formula: ClassVar[str] = "ℓ(R_w) + ½ ℓ(-R_w) + ½ ℓ(-R_l), R_w = β r_w - γ/2, R_l = β r_l + γ/2"
    source: ClassVar[str] = "NCA, arXiv 2402.05369"

    beta: float = 0.1

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Classify data against noise."""
        return links.log_loss(chosen) + (links.log_loss(-chosen) + links.log_loss(-rejected)) / 2


@dataclass(frozen=True, kw_only=True)
class BCOPair(TwoSidedLoss):
    """Binary classifier optimization of pairs: ℓ(R_w - δ) + ℓ(-(R_l - δ)).

    Args:
        beta: reward units per nat, > 0.
        shift: δ. `none`: 0. `batch`: (mean R_w + mean R_l)/2 over this micro-batch on all ranks, without graph:
            the paper's reward shift without its moving average, so that the loss has no state.

    Source:
        BCO, arXiv 2404.04656; δ = 0 is its binary cross-entropy before the reward shift, as TRL 1.16 has it.
    """

    name: ClassVar[str] = "bco_pair"
    formula: ClassVar[str] = "ℓ(R_w - δ) + ℓ(δ - R_l), R_w = β r_w - γ/2, R_l = β r_l + γ/2"
    source: ClassVar[str] = "BCO, arXiv 2404.04656"

    beta: float = 0.1
    shift: Shift = "none"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.shift in get_args(Shift), "bco_pair.shift", self.shift, ", ".join(get_args(Shift)))

    @property
    def couples_pairs(self) -> bool:  # type: ignore[override]
        """Through the batch's δ."""
        return self.shift == "batch"

    def baseline(self, pair_rewards: PairRewards, ranks: Ranks) -> PairRewards | None:
        """Both sides are measured from δ."""
        if self.shift == "none":
            return None
        delta = _batch_mean(pair_rewards, ranks).mean()
        return PairRewards(delta, delta)

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Classify chosen against rejected."""
        return links.log_loss(chosen) + links.log_loss(-rejected)


@dataclass(frozen=True, kw_only=True)
class SPPOHard(TwoSidedLoss):
    """Self-play preference optimization with hard labels: ((R_w - 1/2) / β)² + ((R_l + 1/2) / β)².

    Not monotone in γ: smallest at γ = h - 1.

    Args:
        beta: reward units per nat, > 0; each log-ratio aims for ±1/(2β) without a margin.

    Source:
        SPPO, arXiv 2405.00675, eq. 4.7 with win probability 1 for the chosen completion.
    """

    name: ClassVar[str] = "sppo_hard"
    formula: ClassVar[str] = "(r_w - (1+γ)/(2β))² + (r_l + (1+γ)/(2β))²"
    source: ClassVar[str] = "SPPO, arXiv 2405.00675"

    beta: float = 0.1

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Squared distances to the targets, in nats."""
        return ((chosen - 0.5) / self.beta).square() + ((rejected + 0.5) / self.beta).square()


@dataclass(frozen=True, kw_only=True)
class APOZero(TwoSidedLoss):
    """Anchored preference optimization, zero: s(-R_w) + s(R_l): raise the chosen, lower the rejected.

    For chosen completions better than what the policy writes.

    Args:
        beta: reward units per nat, > 0.

    Source:
        APO, arXiv 2408.06266, eq. 7.
    """

    name: ClassVar[str] = "apo_zero"
    formula: ClassVar[str] = "s(-R_w) + s(R_l), R_w = β r_w - γ/2, R_l = β r_l + γ/2"
    source: ClassVar[str] = "APO, arXiv 2408.06266"

    beta: float = 0.1

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Sigmoid on both sides."""
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True, kw_only=True)
class APODown(TwoSidedLoss):
    """Anchored preference optimization, down: s(R_w) + s(-(R_w - R_l)): lower both, the rejected more.

    For chosen completions worse than what the policy writes. Not monotone in γ: it turns where
    s'(R_w - γ/2) = 2 s'(h - γ).

    Args:
        beta: reward units per nat, > 0.

    Source:
        APO, arXiv 2408.06266, eq. 8.
    """

    name: ClassVar[str] = "apo_down"
    formula: ClassVar[str] = "s(R_w) + s(R_l - R_w), R_w = β r_w - γ/2, R_l = β r_l + γ/2"
    source: ClassVar[str] = "APO, arXiv 2408.06266"

    beta: float = 0.1

    def link(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Anchor the chosen below, and keep the rejected below it."""
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def _batch_mean(pair_rewards: PairRewards, ranks: Ranks) -> Tensor:
    """Mean rewards of chosen and rejected over this micro-batch on all ranks, [2]."""
    return ranks.all_gather(torch.stack([pair_rewards.chosen, pair_rewards.rejected], dim=1)).mean(dim=0)

"""Margins from running statistics of the batch: α-DPO and AMaPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.losses.base import require_not_negative
from gamma_po.margins.base import BetaMargin, as_target_margin
from gamma_po.ranks import Local, Ranks
from gamma_po.state import Moments, float64, mean_and_std, no_moments, updated
from gamma_po.types import Evidence, PairLogps

ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative: what is left of equal log-probabilities
MAX_EXPONENT = 20.0


@dataclass(frozen=True, kw_only=True)
class AlphaDPO(BetaMargin):
    """γ = γ0 + β α z, z the z-score of the policy's per-token gap minus the reference's.

    Args:
        gamma0: γ0, reward units.
        alpha: α >= 0.
        beta: see `BetaMargin`.
        decay: of the running mean and variance, in [0, 1).

    Source:
        α-DPO, arXiv 2410.10148; here with bias-corrected running statistics over all ranks.
    """

    name: ClassVar[str] = "alpha_dpo"
    formula: ClassVar[str] = "γ = γ0 + β α z((a/n_w - b/n_l) - (a0/n_w - b0/n_l)), running z-score"
    source: ClassVar[str] = "α-DPO, arXiv 2410.10148"
    needs_reference: ClassVar[bool] = True

    gamma0: float = 1.0
    alpha: float = 0.1
    decay: float = 0.9

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(math.isfinite(self.gamma0), "alpha_dpo.gamma0", self.gamma0, "a finite number")
        require_not_negative(self, "alpha")
        require(0 <= self.decay < 1, "alpha_dpo.decay", self.decay, "0 <= decay < 1")

    def init(self) -> Moments:
        """Nothing seen."""
        return no_moments()

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Moments]:
        """Standardise with statistics that include this step's pairs of all ranks."""
        assert evidence.reference is not None, "α-DPO reads the reference's log-probabilities"
        beta = self.decided_beta
        gap = float64(_gap_per_token(evidence.policy) - _gap_per_token(evidence.reference))
        state = updated(state, (ranks or Local()).all_gather(gap), self.decay)
        mean, std = mean_and_std(state)
        z = torch.where(std > 0, (gap - mean) / std.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return as_target_margin(self.gamma0 + beta * self.alpha * z, reward_margin), state


@dataclass(frozen=True, kw_only=True)
class AMaPO(BetaMargin):
    """γ = β exp((mean - d)/std · mean) where d < mean, else 0: a margin for the pairs ranked *worst*.

    d is the policy's per-token gap, mean and std those of the step's pairs of all ranks. The opposite hypothesis
    to γ-PO: push the pairs that lag behind.

    No pair lags where all gaps are equal up to rounding: within 4 float32 roundings of the largest log-probability
    per token. The exponent counts at most MAX_EXPONENT (20, γ = 5e8 β: any loss is saturated there), so that γ is
    finite.

    Args:
        beta: see `BetaMargin`.

    Source:
        AMaPO, arXiv 2511.09385.
    """

    name: ClassVar[str] = "amapo"
    formula: ClassVar[str] = "γ = β 1[d < mean] exp((mean - d)/std · mean), d = a/n_w - b/n_l"
    source: ClassVar[str] = "AMaPO, arXiv 2511.09385"

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Compare each pair's gap with the mean of the step."""
        beta = self.decided_beta
        chosen, rejected = float64(evidence.policy.mean_chosen), float64(evidence.policy.mean_rejected)
        everyone = (ranks or Local()).all_gather(torch.stack([chosen, rejected], dim=1))
        gap, gaps = chosen - rejected, everyone[:, 0] - everyone[:, 1]
        mean, std = gaps.mean(), gaps.std(correction=0)
        exponent = (mean - gap) / std.clamp_min(torch.finfo(torch.float64).tiny) * mean
        below = (gap < mean) & (gaps.max() - gaps.min() > ROUNDING * everyone.abs().max())
        target_margin = torch.where(below, beta * torch.exp(exponent.clamp_max(MAX_EXPONENT)), 0.0)
        return as_target_margin(target_margin, reward_margin), state


def _gap_per_token(logps: PairLogps) -> Tensor:
    return logps.mean_chosen - logps.mean_rejected

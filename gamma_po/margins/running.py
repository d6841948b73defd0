"""Margins from running statistics of the batch: α-DPO and AMaPO."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.losses.base import Loss, require_not_negative
from gamma_po.margins.base import (
    BetaMargin,
    GammaBetaRatio,
    as_target_margin,
    in_reward_units,
    known_reference,
    reward_units_of,
)
from gamma_po.ranks import Local, Ranks
from gamma_po.state import Moments, float64, mean_and_std, no_moments, updated
from gamma_po.types import Evidence, PairLogps

ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative: what is left of equal log-probabilities
MAX_EXPONENT = 20.0


@dataclass(frozen=True, kw_only=True)
class AlphaDPO(BetaMargin):
    """γ = γ0 + β α z, z the z-score of the policy's per-token gap minus the reference's.

    z is 0 where only rounding sets gaps apart: a deviation of at most 4 float32 roundings of the step's largest
    log-probability per token.

    Args:
        gamma0: γ0, mean margin, reward units; or `GammaBetaRatio`, γ0 divided by the loss's β.
        alpha: α >= 0, nats: β α is the margin of one deviation.
        beta: see `BetaMargin`.
        decay: share of the running mean and variance that a step keeps, in [0, 1).

    Source:
        α-DPO, arXiv 2410.10148; here with bias-corrected running statistics over all ranks.
    """

    name: ClassVar[str] = "alpha_dpo"
    formula: ClassVar[str] = "γ = γ0 + β α z((a/n_w - b/n_l) - (a0/n_w - b0/n_l)), running z-score"
    source: ClassVar[str] = "α-DPO, arXiv 2410.10148"
    needs_reference: ClassVar[bool] = True

    gamma0: float | GammaBetaRatio = 1.0
    alpha: float = 0.1
    decay: float = 0.9

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        fits = isinstance(self.gamma0, GammaBetaRatio) or math.isfinite(self.gamma0)
        require(fits, "alpha_dpo.gamma0", self.gamma0, "a finite number")
        require_not_negative(self, "alpha")
        require(0 <= self.decay < 1, "alpha_dpo.decay", self.decay, "0 <= decay < 1")

    def bind(self, loss: Loss) -> BetaMargin:
        """Take β from the loss where it was left open, and γ0 where it is given as a ratio to the loss's β."""
        gamma0 = in_reward_units(self, "gamma0", loss)
        bound = super().bind(loss)
        return bound if gamma0 == self.gamma0 else dataclasses.replace(bound, gamma0=gamma0)  # type: ignore[call-arg]

    def init(self) -> Moments:
        """Nothing seen."""
        return no_moments()

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Moments]:
        """Standardise with statistics that include this step's pairs of all ranks."""
        reference, beta, gamma0 = known_reference(self, evidence), self.decided_beta, reward_units_of(self, "gamma0")
        own = torch.stack([_means(evidence.policy), _means(reference)], dim=1)  # [P, 2 models, 2 completions]
        everyone = (ranks or Local()).all_gather(own)
        gap, gaps = _gap(own), _gap(everyone)
        state = updated(state, gaps, self.decay)
        mean, std = mean_and_std(state)
        z = (gap - mean) / std.clamp_min(torch.finfo(torch.float64).tiny)
        z = torch.where(std > ROUNDING * everyone.abs().max(), z, 0.0)
        return as_target_margin(gamma0 + beta * self.alpha * z, reward_margin), state


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
        own = _means(evidence.policy)
        everyone = (ranks or Local()).all_gather(own)
        gap, gaps = own[:, 0] - own[:, 1], everyone[:, 0] - everyone[:, 1]
        mean, std = gaps.mean(), gaps.std(correction=0)
        exponent = (mean - gap) / std.clamp_min(torch.finfo(torch.float64).tiny) * mean
        below = (gap < mean) & (gaps.max() - gaps.min() > ROUNDING * everyone.abs().max())
        target_margin = torch.where(below, beta * torch.exp(exponent.clamp_max(MAX_EXPONENT)), 0.0)
        return as_target_margin(target_margin, reward_margin), state


def _means(logps: PairLogps) -> Tensor:
    """Log-probabilities per token of chosen and rejected, [P, 2], float64."""
    return torch.stack([float64(logps.mean_chosen), float64(logps.mean_rejected)], dim=1)


def _gap(means: Tensor) -> Tensor:
    """The policy's chosen minus rejected, minus the reference's, [P]."""
    return (means[:, 0, 0] - means[:, 0, 1]) - (means[:, 1, 0] - means[:, 1, 1])

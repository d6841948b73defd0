"""Margins from running statistics of the batch: α-DPO and AMaPO."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require
from gamma_po.losses.base import Loss
from gamma_po.margins.base import Margin, as_target_margin, float64
from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence, PairLogps


class Moments(NamedTuple):
    """Exponentially weighted first and second moment, and the weight they have gathered (for bias correction)."""

    first: Tensor  # [], float64
    second: Tensor  # []
    weight: Tensor  # [] 1 - decay^t


def no_moments() -> Moments:
    """Moments before anything was seen."""
    zero = torch.zeros((), dtype=torch.float64)
    return Moments(zero, zero, zero)


def updated(moments: Moments, values: Tensor, decay: float) -> Moments:
    """Return the moments after a batch of values, [N]."""
    values = float64(values)
    return Moments(
        decay * moments.first + (1 - decay) * values.mean(),
        decay * moments.second + (1 - decay) * values.square().mean(),
        decay * moments.weight + (1 - decay),
    )


def mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    """Bias-corrected mean and standard deviation, [] each.

    Dividing by the gathered weight removes the pull of the zeros that the averages start from; without it a
    +1σ pair reads as many σ in the first steps.
    """
    mean = moments.first / moments.weight
    return mean, (moments.second / moments.weight - mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True, kw_only=True)
class BetaMargin(Margin):
    """What margins with the loss's β share.

    Args:
        beta: β > 0, reward units per nat per token. If not given: that of the loss it is used with.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        """Check β."""
        require(self.beta is None or self.beta > 0, f"{self.name}.beta", self.beta, "a number > 0, or null")

    def bind(self, loss: Loss) -> BetaMargin:
        """Take β from the loss where it was left open."""
        if self.beta is not None:
            return self
        beta = getattr(loss, "beta", None)
        if beta is None:
            raise ConfigError(f"{self.name}.beta is undecided: the loss {loss.name!r} has no beta, so give one")
        return dataclasses.replace(self, beta=beta)

    @property
    def decided_beta(self) -> float:
        """β, given or bound."""
        if self.beta is None:
            raise ConfigError(f"{self.name}.beta is undecided: give beta, or bind the margin to a loss")
        return self.beta


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
        require(self.alpha >= 0, "alpha_dpo.alpha", self.alpha, "a number >= 0")
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
        gap = float64(_gap_per_token(evidence.policy))
        everyone = (ranks or Local()).all_gather(gap)
        mean, std = everyone.mean(), everyone.std(correction=0)
        z = (mean - gap) / std.clamp_min(torch.finfo(torch.float64).tiny)
        below = (gap < mean) & (std > 0)
        return as_target_margin(torch.where(below, beta * torch.exp(z * mean), 0.0), reward_margin), state


def _gap_per_token(logps: PairLogps) -> Tensor:
    return logps.mean_chosen - logps.mean_rejected

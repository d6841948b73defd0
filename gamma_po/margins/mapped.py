"""The map margin: γ is a monotone function of how much the frozen reference prefers the chosen completion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require
from gamma_po.losses.base import Loss, require_margin_fits, require_positive
from gamma_po.margins.base import BetaMargin, Pool, PoolMargin, as_target_margin, known_reference
from gamma_po.margins.maps import MapShape, Piecewise, Quantile
from gamma_po.margins.standardization import location_and_scale
from gamma_po.ranks import Ranks
from gamma_po.state import float64
from gamma_po.types import Evidence, PairLogps


class Fitted(NamedTuple):
    """Statistics of the training split."""

    location: Tensor  # [] of the reference margins
    scale: Tensor  # []
    multiplier: Tensor  # [] brings the mean γ to the budget
    score: Tensor  # [N] sorted reference margins, float64; empty before fitting


@dataclass(frozen=True, kw_only=True)
class Map(BetaMargin, PoolMargin):
    """γ = g((m - location) / scale), m = log π_ref(chosen) - log π_ref(rejected).

    Two steps: the frozen reference scores every training pair once, and the map turns its margin into γ.
    The statistics are those of the training split, as labelled.

    Args:
        shape: the map g; see `gamma_po.margins.maps`.
        standardize: what g sees: m as it is, its z-score, its robust z-score (median, 1.4826 MAD), or its quantile
            in the training split, in [0, 1] with mid-ranks for ties (`Quantile` needs it: gmax F(m)^p).
        length_norm: use log-probabilities per token in m.
        budget: rescale γ so that its mean over the training split is this, in `units`; None for no rescaling.
        units: of what g gives. "reward": γ is g. "logratio": γ is β g, that is, g is taken from the log-ratios.
        strength: a number that multiplies γ, after the budget. Negative: the map reads -m, for a reference that
            orders pairs wrongly more often than not, and γ is multiplied by |strength|. 0: no margin. `study
            calibrate` chooses it.
        beta: β > 0 of `units: logratio`, reward units per nat. If not given: that of the loss it is used with.

    Source:
        the published review of γ-PO (arXiv 2506.03690): a mapping function of the reference's margin.
    """

    name: ClassVar[str] = "map"
    formula: ClassVar[str] = "γ = g(z(m)) (units: logratio: β g), m = log π_ref(chosen) - log π_ref(rejected)"
    source: ClassVar[str] = "review of arXiv 2506.03690"
    needs_reference: ClassVar[bool] = True
    needs_fit: ClassVar[bool] = True

    shape: MapShape = field(default_factory=Piecewise)
    standardize: Literal["raw", "z", "robust_z", "quantile"] = "robust_z"
    length_norm: bool = False
    budget: float | None = None
    units: Literal["reward", "logratio"] = "reward"
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        allowed = ("raw", "z", "robust_z", "quantile")
        require(self.standardize in allowed, "map.standardize", self.standardize, ", ".join(allowed))
        fits = self.standardize == "quantile" or not isinstance(self.shape, Quantile)
        require(fits, "map.standardize", self.standardize, f"quantile with map.shape={self.shape!r}")
        if self.budget is not None:
            require_positive(self, "budget")
        require(self.units in ("reward", "logratio"), "map.units", self.units, "reward, logratio")
        require(math.isfinite(self.strength), "map.strength", self.strength, "a finite number")
        unused = self.beta is not None and self.units == "reward"
        require(not unused, "map.beta", self.beta, "nothing with map.units=reward, which does not read it")
        super().__post_init__()

    def bind(self, loss: Loss) -> BetaMargin:
        """Take β from the loss where it is needed and was left open."""
        require_margin_fits(loss, self.name)
        return self if self.units == "reward" else super().bind(loss)

    def init(self) -> Fitted:
        """Not fitted."""
        one = torch.ones((), dtype=torch.float64)
        return Fitted(torch.zeros_like(one), one, one, torch.empty(0, dtype=torch.float64))

    def fit(self, reference: PairLogps) -> Fitted:
        """Read location, scale and budget off the training split.

        Raises:
            DataError: no margins, one that is not finite, or margins without a z-score.
            ConfigError: no rescaling meets the budget.
        """
        score = self._score(reference).sort().values
        one = torch.ones((), dtype=torch.float64, device=score.device)
        statistics = "raw" if self.standardize == "quantile" else self.standardize  # a quantile is of m as it is
        location, scale = location_and_scale(score, statistics)
        fitted = Fitted(location, scale, one, score)
        if self.budget is None:
            return fitted
        mean = self._apply(score, fitted).mean()
        if not mean > 0:
            raise ConfigError(f"map.budget={self.budget} cannot be met: the map gives γ with mean {float(mean)}")
        return fitted._replace(multiplier=self.budget / mean)

    def allocate(self, reward_margin: Tensor, evidence: Evidence, state: Fitted, ranks: Ranks) -> tuple[Pool, Fitted]:
        """The training split; a pair stands where its reference margin ranks there, ties at one place."""
        self._check_fitted(state)
        score = self._score(known_reference(self, evidence))
        position = torch.searchsorted(state.score, score).clamp(max=len(state.score) - 1)
        return Pool(state.score, self._unit * self._apply(state.score, state), position), state

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Fitted]:
        """The map of each pair's reference margin."""
        self._check_fitted(state)
        target_margin = self._unit * self._apply(self._score(known_reference(self, evidence)), state)
        return as_target_margin(target_margin, reward_margin), state

    @property
    def _unit(self) -> float:
        """Reward units per unit of g."""
        return abs(self.strength) * (1.0 if self.units == "reward" else self.decided_beta)

    def _score(self, reference: PairLogps) -> Tensor:
        chosen, rejected = reference.chosen, reference.rejected
        if self.length_norm:
            chosen, rejected = reference.mean_chosen, reference.mean_rejected
        return math.copysign(1.0, self.strength) * (float64(chosen) - float64(rejected))

    def _apply(self, score: Tensor, state: Fitted) -> Tensor:
        if self.standardize == "quantile":
            below, up_to = (torch.searchsorted(state.score, score, right=right) for right in (False, True))
            return state.multiplier * self.shape(float64(below + up_to) / (2 * len(state.score)))
        return state.multiplier * self.shape((score - state.location) / state.scale)

    def _check_fitted(self, state: Fitted) -> None:
        if state.score.numel() == 0:
            raise ConfigError(
                "the map margin has no statistics yet: they are fitted on the training split by `fit` and saved in "
                "its checkpoints; give a checkpoint, or call margin.fit(reference_logps)"
            )

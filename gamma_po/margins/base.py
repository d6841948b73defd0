"""What every target margin is: a rule from reward margins (and explicit state) to γ per pair."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from gamma_po.errors import ConfigError, require
from gamma_po.losses.base import Loss, require_margin_fits, require_positive
from gamma_po.ranks import Ranks
from gamma_po.state import NoState
from gamma_po.types import Evidence, PairLogps


class Pool(NamedTuple):
    """The pairs among which a margin is allocated, and where this rank's pairs stand in it."""

    score: Tensor  # [M] what γ increases with
    target_margin: Tensor  # [M] γ, reward units
    position: Tensor  # [P] index into the pool


class Margin(ABC):
    """A rule for the target margin γ, in reward units.

    State goes in and comes out; it is a NamedTuple of tensors, equal on every rank, and saved in checkpoints.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    reads_column: ClassVar[bool] = False
    is_constant: ClassVar[bool] = False  # True: the same γ for every pair

    def bind(self, loss: Loss) -> Margin:
        """Return this margin with options left open decided for `loss`.

        Raises:
            ConfigError: the loss compares nothing, so that no margin but `none` fits; or it leaves an option open.
        """
        require_margin_fits(loss, self.name)
        return self

    def init(self) -> Any:
        """Return the state before the first step."""
        return NoState()

    def fit(self, reference: PairLogps) -> Any:
        """Return the state after seeing the reference's log-probabilities of the training split, [N] each."""
        return self.init()

    def check_column(self, column: Tensor) -> int | None:
        """Return the first row whose number this margin cannot take; None if it can take all.

        Args:
            column: [N], the data column with the labels as training sees them.
        """
        return None

    @abstractmethod
    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Return γ and the next state.

        Args:
            reward_margin: h, [P], reward units; read without its graph.
            evidence: [P] each.
            state: from `init`, `fit` or the previous call; not changed.
            ranks: the processes of the run; one process if None.

        Returns:
            γ, [P], detached, in the dtype of `reward_margin`; and the next state.
        """


class PoolMargin(Margin):
    """A margin that is allocated over a pool of pairs, in which it can be reversed or shuffled."""

    pool_is_step: ClassVar[bool] = False  # True: nothing but this step's pairs, of which there may be only one

    @abstractmethod
    def allocate(self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[Pool, Any]:
        """Return the pool and the next state."""


@dataclass(frozen=True, kw_only=True)
class GammaBetaRatio:
    """A margin divided by β, as SimPO's papers state it; may stand where a margin takes γ0 or γ in reward units.

    Multiplied by the loss's β when the margin is bound to the loss: γ0 = β · gamma_beta_ratio.

    Args:
        gamma_beta_ratio: γ/β, nats (per token, where rewards are).
    """

    gamma_beta_ratio: float

    def __post_init__(self) -> None:
        """Check that it is a number."""
        require(math.isfinite(self.gamma_beta_ratio), "gamma_beta_ratio", self.gamma_beta_ratio, "a finite number")


def in_reward_units(margin: Margin, option: str, loss: Loss) -> float:
    """Return an option in reward units, multiplied by the loss's β where it is given as a ratio to it.

    Raises:
        ConfigError: a ratio, and the loss has no β or one that changes from step to step.
    """
    value = getattr(margin, option)
    if not isinstance(value, GammaBetaRatio):
        return value
    problem = _without_one_beta(loss)
    if loss.reward_scale is None or problem:
        raise ConfigError(
            f"{margin.name}.{option}={value!r} is not allowed with the loss {loss.name!r}, which {problem}; allowed: a "
            "number, in reward units"
        )
    return value.gamma_beta_ratio * loss.reward_scale


def _without_one_beta(loss: Loss) -> str | None:
    """Why a loss has no β that a margin could take; None where it has one."""
    if loss.reward_scale is None:
        return "has no beta"
    return "has another beta at every step" if loss.beta_changes else None


def reward_units_of(margin: Margin, option: str) -> float:
    """Return an option in reward units, given so or bound.

    Raises:
        ConfigError: it is a ratio to a β that nothing has decided.
    """
    value = getattr(margin, option)
    if isinstance(value, GammaBetaRatio):
        raise ConfigError(
            f"{margin.name}.{option}={value!r} is undecided: bind the margin to a loss, whose beta multiplies it; "
            "or give a number, in reward units"
        )
    return value


def known_reference(margin: Margin, evidence: Evidence) -> PairLogps:
    """Return the reference's log-probabilities.

    Raises:
        ConfigError: they are not there.
    """
    if evidence.reference is None:
        raise ConfigError(
            f"the margin {margin.name!r} needs the reference's log-probabilities, but Evidence.reference=None; "
            "allowed: PairLogps of the same pairs"
        )
    return evidence.reference


@dataclass(frozen=True, kw_only=True)
class BetaMargin(Margin):
    """What margins share that depend on the loss's β.

    Args:
        beta: β > 0, reward units per nat. If not given: that of the loss it is used with.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        """Check β."""
        if self.beta is not None:
            require_positive(self, "beta")

    def bind(self, loss: Loss) -> BetaMargin:
        """Take β from the loss where it was left open.

        Raises:
            ConfigError: it was, and the loss has no β or one that changes from step to step.
        """
        super().bind(loss)
        if self.beta is not None:
            return self
        if problem := _without_one_beta(loss):
            raise ConfigError(f"{self.name}.beta is undecided: the loss {loss.name!r} {problem}, so give one")
        return dataclasses.replace(self, beta=loss.reward_scale)

    @property
    def decided_beta(self) -> float:
        """β, given or bound."""
        if self.beta is None:
            raise ConfigError(f"{self.name}.beta is undecided: give beta, or bind the margin to a loss")
        return self.beta


def as_target_margin(target_margin: Tensor, reward_margin: Tensor) -> Tensor:
    """Return γ in the dtype and on the device of the reward margin; the dtype first, as MPS has no float64."""
    return target_margin.to(reward_margin.dtype).to(reward_margin.device)


def strength(margin: Any) -> float | None:
    """Return γ0/τ of a KL margin, also of one that another margin reverses or shuffles; None for other
    margins, and where γ0 is still a ratio to a loss's β."""
    margin = getattr(margin, "inner", margin)
    if not (hasattr(margin, "gamma0") and hasattr(margin, "tau")):
        return None
    return None if isinstance(margin.gamma0, GammaBetaRatio) else margin.gamma0 / margin.tau

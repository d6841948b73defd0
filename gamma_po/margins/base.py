"""What every target margin is: a rule from reward margins (and explicit state) to γ per pair."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from gamma_po.errors import ConfigError
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
    """A margin that is allocated over a pool of pairs, so that it can be reversed or shuffled there."""

    pool_is_step: ClassVar[bool] = False  # True: nothing but this step's pairs, of which there may be only one

    @abstractmethod
    def pool(self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[Pool, Any]:
        """Return the pool and the next state."""


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
        """Take β from the loss where it was left open."""
        super().bind(loss)
        if self.beta is not None:
            return self
        if loss.reward_scale is None:
            raise ConfigError(f"{self.name}.beta is undecided: the loss {loss.name!r} has no beta, so give one")
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
    """Return γ0/τ of a KL margin, also of one that another margin reverses or shuffles; None for other margins."""
    margin = getattr(margin, "inner", margin)
    if hasattr(margin, "gamma0") and hasattr(margin, "tau"):
        return margin.gamma0 / margin.tau
    return None

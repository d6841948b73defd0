"""Ablations: the same margins given to the wrong pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses.base import Loss
from gamma_po.margins.base import Margin, PoolMargin, as_target_margin
from gamma_po.margins.kl import KL
from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence, PairLogps


def reversed_ranks(score: Tensor, target_margin: Tensor) -> Tensor:
    """Give the largest γ to the smallest score, and so on; the mean of γ stays the same.

    Args:
        score: [M]; ties share the average of what their ranks receive. Or [M, ...]: many pools side by side.
        target_margin: shape of `score`.

    Returns:
        Shape of `score`.

    >>> reversed_ranks(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.3, 0.1, 0.2]))
    tensor([0.1000, 0.3000, 0.2000])
    """
    return shared_at_ties(score, _given_by_rank(score, target_margin.sort(dim=0, descending=True).values))


def shared_at_ties(score: Tensor, target_margin: Tensor) -> Tensor:
    """Give entries of equal score the average of their γ's; the mean of γ stays the same.

    Args:
        score: [M], or [M, ...]: many pools side by side.
        target_margin: shape of `score`.

    Returns:
        Shape of `score`.

    >>> shared_at_ties(torch.tensor([2.0, 1.0, 2.0]), torch.tensor([0.5, 0.3, 0.0]))
    tensor([0.2500, 0.3000, 0.2500])
    """
    order = score.argsort(dim=0, stable=True)
    ordered, margin = score.gather(0, order), target_margin.gather(0, order)
    starts = torch.ones_like(order)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1
    total = torch.zeros_like(margin).scatter_add(0, group, margin).gather(0, group)
    count = torch.zeros_like(margin).scatter_add(0, group, torch.ones_like(margin)).gather(0, group)
    return _given_by_rank(score, torch.where(count > 1, total / count, margin))


def _given_by_rank(score: Tensor, by_rank: Tensor) -> Tensor:
    """Give the first of `by_rank` to the smallest score of its pool, and so on; [M, ...] each."""
    return torch.empty_like(by_rank).scatter(0, score.argsort(dim=0, stable=True), by_rank)


ALLOWED = "kl with history > 0, kl_authors with sample > 0, map"


class PoolWrapper(Margin):
    """A margin that gives the inner margin's γ's to other pairs of the same pool.

    The pool is that of the inner margin: history and step for KL, the training split for a map, never the
    micro-batch: an inner margin whose pool is the step alone (kl_dual, kl with history=0, kl_authors with sample=0) is
    refused, as one pair per step would keep its own γ.
    """

    inner: Margin

    def __post_init__(self) -> None:
        """Check the inner margin."""
        if not isinstance(self.inner, PoolMargin):
            raise ConfigError(
                f"{self.name}.inner={self.inner.name!r} is not allowed: it allocates nothing over a pool of pairs, so "
                f"there is nothing to give to others; allowed: {ALLOWED}"
            )
        if self.inner.pool_is_step:
            raise ConfigError(
                f"{self.name}.inner={self.inner!r} is not allowed: its pool is this step's pairs alone, so that with "
                f"one pair per step {self.name} would change nothing; allowed: {ALLOWED}"
            )

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_reference

    @property
    def needs_fit(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_fit

    def bind(self, loss: Loss) -> PoolWrapper:
        """Bind the inner margin."""
        super().bind(loss)
        return dataclasses.replace(self, inner=self.inner.bind(loss))  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class Reverse(PoolWrapper):
    """The inner margin's γ in reverse rank order over its pool (KL) or the training split (map).

    Pairs with equal scores (reward margin or reference margin) share the average of the γ's that their ranks
    receive, so that the mean of γ over the pool is the inner margin's, and without ties also its multiset.

    Args:
        inner: the margin to reverse.

    Source:
        the `reverse` ablation of γ-PO, arXiv 2506.03690.
    """

    name: ClassVar[str] = "reverse"
    formula: ClassVar[str] = "same γ's, largest to the least confident pair"
    source: ClassVar[str] = "ablation in arXiv 2506.03690"

    inner: Margin = field(default_factory=KL)

    def init(self) -> Any:
        """The inner margin's state."""
        return self.inner.init()

    def fit(self, reference: PairLogps) -> Any:
        """Fit the inner margin."""
        return self.inner.fit(reference)

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Reverse within the pool, then take this rank's pairs."""
        assert isinstance(self.inner, PoolMargin)
        pool, state = self.inner.pool(reward_margin, evidence, state, ranks or Local())
        target_margin = reversed_ranks(pool.score, pool.target_margin)
        return as_target_margin(target_margin[pool.position], reward_margin), state


class ShuffledState(NamedTuple):
    """The inner margin's state and the number of steps taken."""

    inner: Any
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class Shuffled(PoolWrapper):
    """The inner margin's γ's given to random pairs of its pool: same multiset, no information.

    Pairs with equal scores share the average of what they receive, as in `Reverse`.

    A map's pool is the training split, whose permutation stays the same for the whole run; a KL margin's pool
    is permuted anew each step.

    Args:
        inner: the margin to shuffle.
        seed: of the permutations.

    Source:
        control for the ablations of γ-PO, arXiv 2506.03690; this project's own.
    """

    name: ClassVar[str] = "shuffled"
    formula: ClassVar[str] = "same γ's, given to random pairs"
    source: ClassVar[str] = "control (own)"

    inner: Margin = field(default_factory=KL)
    seed: int = 0

    def init(self) -> ShuffledState:
        """No step taken."""
        return ShuffledState(self.inner.init(), torch.zeros((), dtype=torch.int64))

    def fit(self, reference: PairLogps) -> ShuffledState:
        """Fit the inner margin."""
        return self.init()._replace(inner=self.inner.fit(reference))

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, ShuffledState]:
        """Permute by rank within the pool, so that the order of the pairs does not matter."""
        assert isinstance(self.inner, PoolMargin)
        pool, inner = self.inner.pool(reward_margin, evidence, state.inner, ranks or Local())
        step = 0 if self.inner.needs_fit else int(state.steps)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        permutation = torch.randperm(len(pool.score), generator=generator).to(pool.score.device)
        permuted = pool.target_margin.sort(dim=0).values[permutation]
        target_margin = shared_at_ties(pool.score, _given_by_rank(pool.score, permuted))
        return as_target_margin(target_margin[pool.position], reward_margin), ShuffledState(inner, state.steps + 1)

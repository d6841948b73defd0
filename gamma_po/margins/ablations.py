"""Ablations: the same margins given to the wrong pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import require, require_integer
from gamma_po.losses.base import Loss
from gamma_po.margins.base import Margin, Pool, PoolMargin, as_target_margin
from gamma_po.margins.kl import KL
from gamma_po.ranks import Local, Ranks
from gamma_po.state import float64
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


class RecentMargins(NamedTuple):
    """The inner margin's state, and the most recent γ's of all ranks, oldest first."""

    inner: Any
    target_margin: Tensor  # [at most `history`], float64


HISTORY = 256


class PoolWrapper(Margin):
    """A margin that gives the inner margin's γ's to other pairs of the same pool, never of the micro-batch alone.

    The pool is the inner margin's own where that has one beyond the step: step and history for KL, the training
    split for a map. For the others (column, alpha_dpo, amapo, kl_dual, kl without a history) it is the γ's of
    this step, of all ranks, and the most recent `history` ones, ranked by γ itself: with one pair in a step there
    is something to exchange if γ differs from step to step, which it does not for KL without a history: one pair
    alone has γ0. Over the pool the mean of γ is the inner margin's; over training it is too, as far as the pool is
    like the data. Margins that are the same for every pair (none, fixed) stay as they are.
    """

    inner: Margin
    history: int | None

    def __post_init__(self) -> None:
        """Check the options."""
        require(
            not isinstance(self.inner, PoolWrapper),
            f"{self.name}.inner",
            self.inner.name,
            "a margin that gives each pair its own γ: any but reverse and shuffled",
        )
        if self.history is not None:
            require_integer(f"{self.name}.history", self.history, at_least=1)
            why = "the same γ for every pair" if self.inner.is_constant else "a pool of its own"
            allowed = f"nothing with {self.inner.name!r}, which has {why}"
            require(self._remembers, f"{self.name}.history", self.history, allowed)

    @property
    def _remembers(self) -> bool:
        """Whether the pool is this margin's own."""
        has_pool = isinstance(self.inner, PoolMargin) and not self.inner.pool_is_step
        return not has_pool and not self.inner.is_constant

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_reference

    @property
    def needs_fit(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_fit

    @property
    def reads_column(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.reads_column

    @property
    def is_constant(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.is_constant

    def check_column(self, column: Tensor) -> int | None:
        """As the inner margin."""
        return self.inner.check_column(column)

    def bind(self, loss: Loss) -> PoolWrapper:
        """Bind the inner margin."""
        super().bind(loss)
        return dataclasses.replace(self, inner=self.inner.bind(loss))  # type: ignore[type-var]

    def init(self) -> Any:
        """The inner margin's state, and no γ seen."""
        return self._with_history(self.inner.init())

    def fit(self, reference: PairLogps) -> Any:
        """Fit the inner margin."""
        return self._with_history(self.inner.fit(reference))

    def _with_history(self, inner: Any) -> Any:
        return RecentMargins(inner, torch.empty(0, dtype=torch.float64)) if self._remembers else inner

    def _allocate(self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[Pool, Any]:
        """The inner margin's pool; or the γ's of this step and before, each its own score."""
        if not self._remembers:
            assert isinstance(self.inner, PoolMargin)
            return self.inner.allocate(reward_margin, evidence, state, ranks)
        target_margin, inner = self.inner(reward_margin, evidence, state.inner, ranks)
        gathered = ranks.gather(float64(target_margin))
        past = state.target_margin.to(gathered.values.device)
        pool = torch.cat([past, gathered.values])
        start = len(past) + gathered.start
        position = torch.arange(start, start + len(target_margin), device=pool.device)
        kept = HISTORY if self.history is None else self.history
        return Pool(pool, pool, position), RecentMargins(inner, pool[max(0, len(pool) - kept) :])


@dataclass(frozen=True, kw_only=True)
class Reverse(PoolWrapper):
    """The inner margin's γ in reverse rank order over its pool: see `PoolWrapper` for which that is.

    Pairs with equal scores (reward margin, reference margin or γ) share the average of the γ's that their ranks
    receive, so that the mean of γ over the pool is the inner margin's, and without ties also its multiset.

    Args:
        inner: the margin to reverse; any but reverse and shuffled.
        history: number of recent γ's of all ranks that join this step's, >= 1; only where the inner margin has no
            pool of its own, and 256 there if not given.

    Source:
        the `reverse` ablation of γ-PO, arXiv 2506.03690.
    """

    name: ClassVar[str] = "reverse"
    formula: ClassVar[str] = "same γ's, largest to the smallest score (h, m or γ itself)"
    source: ClassVar[str] = "ablation in arXiv 2506.03690"

    inner: Margin = field(default_factory=KL)
    history: int | None = None

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Reverse within the pool, then take this rank's pairs."""
        if self.is_constant:
            return self.inner(reward_margin, evidence, state, ranks)
        pool, state = self._allocate(reward_margin, evidence, state, ranks or Local())
        target_margin = reversed_ranks(pool.score, pool.target_margin)
        return as_target_margin(target_margin[pool.position], reward_margin), state


class ShuffledState(NamedTuple):
    """The inner margin's state (or `RecentMargins`) and the number of steps taken."""

    inner: Any
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class Shuffled(PoolWrapper):
    """The inner margin's γ's given to random pairs of its pool: same multiset, no information.

    Pairs with equal scores share the average of what they receive, as in `Reverse`, which names the pools.

    A map's pool is the training split, whose permutation stays the same for the whole run; the other pools are
    permuted anew each step.

    Args:
        inner: the margin to shuffle; any but reverse and shuffled.
        seed: of the permutations, an integer, together with the step.
        history: number of recent γ's of all ranks that join this step's, >= 1; where and how as in `Reverse`.

    Source:
        control for the ablations of γ-PO, arXiv 2506.03690; this project's own.
    """

    name: ClassVar[str] = "shuffled"
    formula: ClassVar[str] = "same γ's, given to random pairs"
    source: ClassVar[str] = "control (own)"

    inner: Margin = field(default_factory=KL)
    seed: int = 0
    history: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require_integer("shuffled.seed", self.seed)

    def _with_history(self, inner: Any) -> Any:
        """No step taken; nothing to remember where every pair has the same γ."""
        state = super()._with_history(inner)
        return state if self.is_constant else ShuffledState(state, torch.zeros((), dtype=torch.int64))

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Permute by rank within the pool, so that the order of the pairs does not matter."""
        if self.is_constant:
            return self.inner(reward_margin, evidence, state, ranks)
        pool, inner = self._allocate(reward_margin, evidence, state.inner, ranks or Local())
        step = 0 if self.inner.needs_fit else int(state.steps)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        permutation = torch.randperm(len(pool.score), generator=generator).to(pool.score.device)
        permuted = pool.target_margin.sort(dim=0).values[permutation]
        target_margin = shared_at_ties(pool.score, _given_by_rank(pool.score, permuted))
        return as_target_margin(target_margin[pool.position], reward_margin), ShuffledState(inner, state.steps + 1)

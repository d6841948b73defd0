"""What a KL margin is made of: a pool of pairs that share γ0, and a solver that finds the shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import require_integer
from gamma_po.margins.mirror_descent import mirror_descent_margins
from gamma_po.margins.solver import priced_kl_margins, solve_kl_margins


class Joined(NamedTuple):
    """A step's pairs among others."""

    score: Tensor  # [M] h of the pool, float64
    start: int  # where the step's pairs begin


class Allocated(NamedTuple):
    """A solved pool."""

    score: Tensor  # [M] h, float64
    target_margin: Tensor  # [M] γ, not centred
    start: int  # where the step's pairs begin


class KLPool(ABC):
    """Which pairs the margins of one step are allocated among, beside the step's own of all ranks."""

    @property
    @abstractmethod
    def is_step(self) -> bool:
        """Whether there are none beside the step's own."""

    @abstractmethod
    def init(self) -> Any:
        """Return the state before the first step."""

    @abstractmethod
    def join(self, reward_margin: Tensor, state: Any) -> tuple[Joined, Any]:
        """Return the pool of this step, and the next state.

        Args:
            reward_margin: h of the step's pairs of all ranks, [N], float64.
            state: from `init` or the previous step.
        """


class History(NamedTuple):
    """The most recent reward margins of all ranks, oldest first."""

    reward_margin: Tensor  # [at most `history`], float64


@dataclass(frozen=True, kw_only=True)
class RecentPool(KLPool):
    """The most recent reward margins of all ranks.

    Args:
        history: how many recent pairs join the pool, >= 0.
    """

    history: int = 256

    def __post_init__(self) -> None:
        """Check the options."""
        require_integer("RecentPool.history", self.history, at_least=0)

    @property
    def is_step(self) -> bool:
        """Without a history."""
        return self.history == 0

    def init(self) -> History:
        """An empty history."""
        return History(torch.empty(0, dtype=torch.float64))

    def join(self, reward_margin: Tensor, state: History) -> tuple[Joined, History]:
        """History first, then the step; the newest margins become history."""
        past = state.reward_margin.to(reward_margin.device)
        score = torch.cat([past, reward_margin])
        return Joined(score, len(past)), History(_newest(score, self.history))


class Queue(NamedTuple):
    """What can be drawn from, and how many steps have drawn."""

    reward_margin: Tensor  # [at most `memory`], float64, oldest first
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class SampledPool(KLPool):
    """A random sample of remembered reward margins, as the authors' code draws it.

    Differs from that code where it has defects: the queue starts empty, is gathered over ranks, is saved in
    checkpoints, is never touched by validation, and draws with its own seed.

    Args:
        sample: how many remembered pairs join the pool, >= 0.
        memory: how many pairs are remembered, >= sample.
        seed: of the sample, an integer, together with the step.
    """

    sample: int = 256
    memory: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        require_integer("SampledPool.sample", self.sample, at_least=0)
        require_integer("SampledPool.memory", self.memory, at_least=self.sample, limit="SampledPool.sample")
        require_integer("SampledPool.seed", self.seed)

    @property
    def is_step(self) -> bool:
        """Without a sample of the past."""
        return self.sample == 0

    def init(self) -> Queue:
        """An empty queue."""
        return Queue(torch.empty(0, dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def join(self, reward_margin: Tensor, state: Queue) -> tuple[Joined, Queue]:
        """The step first, then the sample; every rank draws the same."""
        past = state.reward_margin.to(reward_margin.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(state.steps))
        drawn = torch.randperm(len(past), generator=generator)[: self.sample].to(past.device)
        queue = _newest(torch.cat([past, reward_margin]), self.memory)
        return Joined(torch.cat([reward_margin, past[drawn]]), 0), Queue(queue, state.steps + 1)


class KLSolver(ABC):
    """How the allocation problem is solved."""

    uses_pool: bool = True

    def init(self, pool: KLPool) -> Any:
        """Return the state before the first step: the pool's, if the solver has none of its own."""
        return pool.init()

    @abstractmethod
    def allocate(
        self, reward_margin: Tensor, pool: KLPool, state: Any, *, gamma0: float, tau: float
    ) -> tuple[Allocated, Any]:
        """Return γ of the pool, and the next state.

        Args:
            reward_margin: h of the step's pairs of all ranks, [N], float64.
            pool: which pairs join them.
            state: from `init` or the previous step.
            gamma0: γ0 > 0, reward units.
            tau: τ > 0, reward units.
        """


@dataclass(frozen=True, kw_only=True)
class Exact(KLSolver):
    """The exact solution over the pool; see `solve_kl_margins`."""

    def allocate(
        self, reward_margin: Tensor, pool: KLPool, state: Any, *, gamma0: float, tau: float
    ) -> tuple[Allocated, Any]:
        """Solve over the pool."""
        (score, start), state = pool.join(reward_margin, state)
        return Allocated(score, solve_kl_margins(score, gamma0=gamma0, tau=tau), start), state


@dataclass(frozen=True, kw_only=True)
class MirrorDescent(KLSolver):
    """The authors' solver, for reproduction; see `mirror_descent_margins`.

    Args:
        steps: number of updates, >= 1, the last of them without effect.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        """Check the options."""
        require_integer("MirrorDescent.steps", self.steps, at_least=1)

    def allocate(
        self, reward_margin: Tensor, pool: KLPool, state: Any, *, gamma0: float, tau: float
    ) -> tuple[Allocated, Any]:
        """Descend over the pool."""
        (score, start), state = pool.join(reward_margin, state)
        target_margin = mirror_descent_margins(score, gamma0=gamma0, tau=tau, steps=self.steps)
        return Allocated(score, target_margin, start), state


class Price(NamedTuple):
    """The price of margin, and whether a step has set it yet."""

    mu: Tensor  # [], float64, the multiplier μ of the allocation problem
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class Dual(KLSolver):
    """A running price instead of a pool.

    Pairs are coupled only through the multiplier μ. It is kept from step to step and corrected by a share of
    the Newton step to mean q = 1 over this step's pairs of all ranks: μ += min(1, N/window) (1 - mean q) / mean q'.
    Then log q_i = μ - (γ0/τ) s(γ_i - h_i) for each pair alone. Mean γ is γ0 only on average over steps.

    Args:
        window: number of pairs over which the price is averaged, >= 1.
    """

    uses_pool = False

    window: int = 512

    def __post_init__(self) -> None:
        """Check the options."""
        require_integer("Dual.window", self.window, at_least=1)

    def init(self, pool: KLPool) -> Price:
        """No price yet: the first step's own pairs set it exactly."""
        return Price(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def allocate(
        self, reward_margin: Tensor, pool: KLPool, state: Price, *, gamma0: float, tau: float
    ) -> tuple[Allocated, Price]:
        """Correct the price with this step's pairs, then give each its margin at that price."""
        h, mu = reward_margin, state.mu.to(reward_margin.device)
        if int(state.steps) == 0:
            target_margin = solve_kl_margins(h, gamma0=gamma0, tau=tau)
            lowest = h.argmin()
            share, excess = target_margin[lowest] / gamma0, target_margin[lowest] - h[lowest]
            mu = torch.log(share) + gamma0 / tau * torch.sigmoid(excess)
        else:
            target_margin, slope = priced_kl_margins(h, mu, gamma0=gamma0, tau=tau)
            mu = mu + min(1.0, len(h) / self.window) * (gamma0 - target_margin.mean()) / slope.mean()
            mu = mu.clamp(0.0, gamma0 / tau)
            target_margin, _ = priced_kl_margins(h, mu, gamma0=gamma0, tau=tau)
        return Allocated(h, target_margin, 0), Price(mu, state.steps + 1)


def _newest(values: Tensor, count: int) -> Tensor:
    return values[max(0, len(values) - count) :]

"""The KL margin of γ-PO: γ solves an allocation problem over current and recent reward margins.

`KL` solves it exactly; `KLDual` keeps only its price and no history; `KLAuthors` reproduces the authors' procedure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require
from gamma_po.losses.base import Loss, require_positive
from gamma_po.margins.base import Pool, PoolMargin, as_target_margin
from gamma_po.margins.solver import mirror_descent_margins, priced_kl_margins, solve_kl_margins
from gamma_po.ranks import Local, Ranks
from gamma_po.state import float64
from gamma_po.types import Evidence


class History(NamedTuple):
    """The most recent reward margins of all ranks, oldest first."""

    reward_margin: Tensor  # [at most `history`], float64


@dataclass(frozen=True, kw_only=True)
class KLMargin(PoolMargin):
    """What the variants of the KL margin share.

    Args:
        gamma0: γ0 > 0, mean margin, reward units.
        tau: τ > 0, strength of the KL term, reward units; large τ gives γ0 to every pair.
        center: subtract γ0, so that a uniform margin leaves the loss unchanged. If not given: true with losses
            on log-ratio rewards (γ-DPO), false with reference-free ones (γ-SimPO).
    """

    gamma0: float = 1.0
    tau: float = 1.0
    center: bool | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self, "gamma0", "tau")

    def bind(self, loss: Loss) -> KLMargin:
        """Decide `center` by the loss where it was left open."""
        super().bind(loss)
        return self if self.center is not None else dataclasses.replace(self, center=loss.centers_kl)

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """This rank's part of the solved pool."""
        pool, state = self.pool(reward_margin, evidence, state, ranks or Local())
        return as_target_margin(pool.target_margin[pool.position], reward_margin), state

    def centred(self, target_margin: Tensor) -> Tensor:
        """Return γ or γ - γ0, as configured."""
        if self.center is None:
            raise ConfigError(
                f"{self.name}.center is undecided: give center=True or center=False, or bind the margin to a loss"
            )
        return target_margin - self.gamma0 if self.center else target_margin


@dataclass(frozen=True, kw_only=True)
class KL(KLMargin):
    """γ-PO's margin: minimise mean[softplus(γ - h) + τ q log q] over γ = γ0 q, q >= 0, mean q = 1.

    The pool is this step's reward margins of all ranks plus the most recent `history` ones. Its mean γ is γ0,
    and max γ / min γ <= exp(γ0/τ), so γ0/τ is the knob that matters.

    How γ depends on the cut of a global batch: ranks are gathered, so their number does not matter. A cut into
    micro-batches changes the pool and with it the one multiplier μ: log γ of each pair moves by at most
    |Δμ| <= c (s(γ0 - min h) - s(γ0 - max h)) < c, c = γ0/τ, extremes over all pools; and
    |log m| <= |Δμ| <= (1 + c max γ / 4) |log m|, m the mean over the smaller pool of γ/γ0 as solved in the whole
    one, so that for a random cut it shrinks like 1/sqrt(pool). A logistic or hinge loss moves by at most |Δγ|.
    (Proven and tested in tests/integration/test_micro_batches.py.) In validation the pool is the history and
    the evaluation batch, so γ there depends a little on `data.eval_batch_size`.

    Args:
        gamma0, tau, center: see `KLMargin`.
        history: how many recent reward margins join the pool, >= 0.

    Source:
        γ-PO, arXiv 2506.03690: the allocation problem behind its algorithm; here solved exactly.
    """

    name: ClassVar[str] = "kl"
    formula: ClassVar[str] = "argmin over γ = γ0 q, mean q = 1: mean[softplus(γ-h) + τ q log q]; minus γ0 if centred"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690"

    history: int = 256

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.history >= 0, "kl.history", self.history, "an integer >= 0")

    @property
    def pool_is_step(self) -> bool:  # type: ignore[override]
        """Without a history."""
        return self.history == 0

    def init(self) -> History:
        """An empty history."""
        return History(torch.empty(0, dtype=torch.float64))

    def pool(self, reward_margin: Tensor, evidence: Evidence, state: History, ranks: Ranks) -> tuple[Pool, History]:
        """Solve over history and this step's margins of all ranks; the newest margins become history."""
        gathered = ranks.gather(float64(reward_margin))
        score = torch.cat([state.reward_margin.to(gathered.values.device), gathered.values])
        target_margin = self.centred(solve_kl_margins(score, gamma0=self.gamma0, tau=self.tau))
        start = len(state.reward_margin) + gathered.start
        position = torch.arange(start, start + len(reward_margin), device=score.device)
        return Pool(score, target_margin, position), History(score[max(0, len(score) - self.history) :])


class Price(NamedTuple):
    """The price of margin, and whether a step has set it yet."""

    mu: Tensor  # [], float64, the multiplier μ of the allocation problem
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class KLDual(KLMargin):
    """The KL margin with a running price instead of a history.

    Pairs are coupled only through the multiplier μ. It is kept from step to step and corrected by a share of
    the Newton step to mean q = 1 over this step's pairs of all ranks: μ += min(1, N/window) (1 - mean q) / mean q'.
    Then log q_i = μ - (γ0/τ) σ(γ_i - h_i) for each pair alone. Mean γ is γ0 only on average over steps.

    Args:
        gamma0, tau, center: see `KLMargin`.
        window: pairs over which the price is averaged, >= 1.

    Source:
        the dual of γ-PO's problem, arXiv 2506.03690; the variant is this project's own.
    """

    name: ClassVar[str] = "kl_dual"
    formula: ClassVar[str] = "γ = γ0 q, log q = μ - (γ0/τ) σ(γ-h), μ a running price with mean q = 1"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690 (dual)"
    pool_is_step: ClassVar[bool] = True

    window: int = 512

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.window >= 1, "kl_dual.window", self.window, "an integer >= 1")

    def init(self) -> Price:
        """No price yet: the first step's own pairs set it exactly."""
        return Price(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def pool(self, reward_margin: Tensor, evidence: Evidence, state: Price, ranks: Ranks) -> tuple[Pool, Price]:
        """Correct the price with this step's pairs, then give each its margin at that price."""
        gathered = ranks.gather(float64(reward_margin))
        h, options = gathered.values, {"gamma0": self.gamma0, "tau": self.tau}
        mu = state.mu.to(h.device)
        if int(state.steps) == 0:
            target_margin = solve_kl_margins(h, **options)
            first = h.argmin()
            mu = torch.log(target_margin[first] / self.gamma0) + self.gamma0 / self.tau * torch.sigmoid(
                target_margin[first] - h[first]
            )
        else:
            target_margin, slope = priced_kl_margins(h, mu, **options)
            share = min(1.0, len(h) / self.window)
            mu = mu + share * (self.gamma0 - target_margin.mean()) / slope.mean()
            mu = mu.clamp(0.0, self.gamma0 / self.tau)
            target_margin, _ = priced_kl_margins(h, mu, **options)
        position = torch.arange(gathered.start, gathered.start + len(reward_margin), device=h.device)
        return Pool(h, self.centred(target_margin), position), Price(mu, state.steps + 1)


class Sampled(NamedTuple):
    """The authors' queue, and how many steps have drawn from it."""

    reward_margin: Tensor  # [at most `memory`], float64, oldest first
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True)
class KLAuthors(KLMargin):
    """The authors' procedure, for reproduction: 20 steps of mirror descent over the batch and a random sample.

    The pool is this step's pairs and `sample` random ones of the last `memory`. Differs from their code where
    that has defects: the queue starts empty, is gathered over ranks, is saved in checkpoints, is never touched
    by validation, and draws with its own seed.

    Args:
        gamma0, tau, center: see `KLMargin`.
        sample: how many remembered reward margins join the pool, >= 0.
        memory: how many are remembered, >= sample.
        seed: of the sample, together with the step.

    Source:
        γ-PO, arXiv 2506.03690, and the published training code.
    """

    name: ClassVar[str] = "kl_authors"
    formula: ClassVar[str] = "as kl, by 20 steps of mirror descent over the batch + a random sample of the past"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690"

    sample: int = 256
    memory: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.sample >= 0, "kl_authors.sample", self.sample, "an integer >= 0")
        require(self.memory >= self.sample, "kl_authors.memory", self.memory, "an integer >= kl_authors.sample")

    @property
    def pool_is_step(self) -> bool:  # type: ignore[override]
        """Without a sample of the past."""
        return self.sample == 0

    def init(self) -> Sampled:
        """An empty queue."""
        return Sampled(torch.empty(0, dtype=torch.float64), torch.zeros((), dtype=torch.int64))

    def pool(self, reward_margin: Tensor, evidence: Evidence, state: Sampled, ranks: Ranks) -> tuple[Pool, Sampled]:
        """Mirror descent over this step's pairs of all ranks and the sample; every rank draws the same."""
        gathered = ranks.gather(float64(reward_margin))
        past = state.reward_margin.to(gathered.values.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(state.steps))
        drawn = torch.randperm(len(past), generator=generator)[: self.sample].to(past.device)
        score = torch.cat([gathered.values, past[drawn]])
        target_margin = self.centred(mirror_descent_margins(score, gamma0=self.gamma0, tau=self.tau))
        position = torch.arange(gathered.start, gathered.start + len(reward_margin), device=score.device)
        queue = torch.cat([past, gathered.values])
        queue = queue[max(0, len(queue) - self.memory) :]
        return Pool(score, target_margin, position), Sampled(queue, state.steps + 1)

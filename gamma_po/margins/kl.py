"""The KL margin of γ-PO: γ solves an allocation problem over current and recent reward margins.

`KL` takes any solver and pool of `gamma_po.margins.allocation`; `KLDual` and `KLAuthors` are two of these under names
of their own.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require, require_integer
from gamma_po.losses.base import Loss, require_positive
from gamma_po.margins.allocation import Dual, Exact, KLPool, KLSolver, MirrorDescent, RecentPool, SampledPool
from gamma_po.margins.base import (
    GammaBetaRatio,
    Pool,
    PoolMargin,
    as_target_margin,
    in_reward_units,
    reward_units_of,
)
from gamma_po.ranks import Local, Ranks
from gamma_po.state import float64
from gamma_po.types import Evidence


class Parts(NamedTuple):
    """What solves over whom."""

    solver: KLSolver
    pool: KLPool


@dataclass(frozen=True, kw_only=True)
class KLMargin(PoolMargin):
    """What the variants of the KL margin share.

    Args:
        gamma0: γ0 > 0, mean margin, reward units; or `GammaBetaRatio`, γ0 divided by the loss's β.
        tau: τ > 0, strength of the KL term, reward units; large τ gives γ0 to every pair.
        center: subtract γ0, so that a uniform margin leaves the loss unchanged. If not given: true with losses
            on log-ratio rewards (γ-DPO), false with reference-free ones (γ-SimPO).
    """

    gamma0: float | GammaBetaRatio = 1.0
    tau: float = 1.0
    center: bool | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.gamma0, GammaBetaRatio):
            require_positive(self, "gamma0")
        require(
            not isinstance(self.gamma0, GammaBetaRatio) or self.gamma0.gamma_beta_ratio > 0,
            f"{self.name}.gamma0",
            self.gamma0,
            "a ratio > 0",
        )
        require_positive(self, "tau")
        _ = self.parts

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """Solver and pool."""

    @property
    def pool_is_step(self) -> bool:  # type: ignore[override]
        """Whether no pair but the step's own shares the margin."""
        return not self.parts.solver.uses_pool or self.parts.pool.is_step

    def bind(self, loss: Loss) -> KLMargin:
        """Decide `center` by the loss where it was left open, and γ0 where it is given as a ratio to β."""
        super().bind(loss)
        center = loss.centers_kl if self.center is None else self.center
        gamma0 = in_reward_units(self, "gamma0", loss)
        if (center, gamma0) == (self.center, self.gamma0):
            return self
        return dataclasses.replace(self, center=center, gamma0=gamma0)

    def init(self) -> Any:
        """Nothing seen."""
        return self.parts.solver.init(self.parts.pool)

    def allocate(self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks) -> tuple[Pool, Any]:
        """Allocate over this step's margins of all ranks and whoever joins them."""
        gathered, gamma0 = ranks.gather(float64(reward_margin)), reward_units_of(self, "gamma0")
        solver, pool = self.parts
        solved, state = solver.allocate(gathered.values, pool, state, gamma0=gamma0, tau=self.tau)
        start = solved.start + gathered.start
        position = torch.arange(start, start + len(reward_margin), device=solved.score.device)
        return Pool(solved.score, self.centred(solved.target_margin), position), state

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """This rank's part of the solved pool."""
        pool, state = self.allocate(reward_margin, evidence, state, ranks or Local())
        return as_target_margin(pool.target_margin[pool.position], reward_margin), state

    def centred(self, target_margin: Tensor) -> Tensor:
        """Return γ or γ - γ0, as configured."""
        if self.center is None:
            raise ConfigError(
                f"{self.name}.center is undecided: give center=True or center=False, or bind the margin to a loss"
            )
        return target_margin - reward_units_of(self, "gamma0") if self.center else target_margin


@dataclass(frozen=True, kw_only=True)
class KL(KLMargin):
    """γ-PO's margin: minimise mean[softplus(γ - h) + τ q log q] over γ = γ0 q, q >= 0, mean q = 1.

    By default it is solved exactly, and the pool is this step's reward margins of all ranks plus the 256 before.
    Its mean γ is γ0, and max γ / min γ <= exp(γ0/τ), so γ0/τ is the knob that matters.

    How γ depends on the cut of a global batch: ranks are gathered, so their number does not matter. A cut into
    micro-batches changes the pool and with it the one multiplier μ: log γ of each pair moves by at most
    |Δμ| <= c (s(γ0 - min h) - s(γ0 - max h)) < c, c = γ0/τ, extremes over all pools; and
    |log m| <= |Δμ| <= (1 + c max γ / 4) |log m|, m the mean over the smaller pool of γ/γ0 as solved in the whole
    one, so that for a random cut it shrinks like 1/sqrt(pool). A logistic or hinge loss moves by at most |Δγ|.
    (Proven and tested in tests/integration/test_micro_batches.py.) In validation the pool is the history and
    the evaluation batch, so γ there depends a little on `data.eval_batch_size`.

    Args:
        gamma0, tau, center: see `KLMargin`.
        history: number of recent pairs that join the pool, >= 0: short for `pool: RecentPool` with this history.
        solver: `Exact`, `MirrorDescent` (the authors'), or `Dual` (a running price, which has no pool).
        pool: which pairs join this step's: `RecentPool`, or `SampledPool` (the authors'). If neither this nor
            `history` is given: the 256 most recent, none with `Dual`.

    Source:
        γ-PO, arXiv 2506.03690: the allocation problem behind its algorithm; here solved exactly.
    """

    name: ClassVar[str] = "kl"
    formula: ClassVar[str] = "argmin over γ = γ0 q, mean q = 1: mean[softplus(γ-h) + τ q log q]; minus γ0 if centred"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690"

    history: int | None = None
    solver: KLSolver = field(default_factory=Exact)
    pool: KLPool | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.history is not None:
            require_integer("kl.history", self.history, at_least=0)
        for option in ("history", "pool"):
            value = getattr(self, option)
            fits = value is None or self.solver.uses_pool
            require(fits, f"kl.{option}", value, f"nothing with kl.solver={self.solver!r}, which has no pool")
        both = self.history is not None and self.pool is not None
        require(not both, "kl.history", self.history, f"nothing beside kl.pool={self.pool!r}, which says it too")
        super().__post_init__()

    @property
    def parts(self) -> Parts:
        """As given."""
        recent = RecentPool() if self.history is None else RecentPool(history=self.history)
        return Parts(self.solver, recent if self.pool is None else self.pool)


@dataclass(frozen=True, kw_only=True)
class KLDual(KLMargin):
    """The KL margin with a running price instead of a history: `KL` with `solver=Dual(window)`.

    Args:
        gamma0, tau, center: see `KLMargin`.
        window: number of pairs over which the price is averaged, >= 1.

    Source:
        the dual of γ-PO's problem, arXiv 2506.03690; the variant is this project's own.
    """

    name: ClassVar[str] = "kl_dual"
    formula: ClassVar[str] = "γ = γ0 q, log q = μ - (γ0/τ) s(γ-h), μ a running price with mean q = 1"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690 (dual)"

    window: int = 512

    @property
    def parts(self) -> Parts:
        """The running price."""
        return Parts(Dual(window=self.window), RecentPool(history=0))


@dataclass(frozen=True, kw_only=True)
class KLAuthors(KLMargin):
    """The authors' procedure, for reproduction: `KL` with `solver=MirrorDescent()` and `pool=SampledPool(...)`.

    The pool is this step's pairs and `sample` random ones of the last `memory`.

    Args:
        gamma0, tau, center: see `KLMargin`.
        sample: how many remembered pairs join the pool, >= 0.
        memory: how many pairs are remembered, >= sample.
        seed: of the sample, an integer, together with the step.

    Source:
        γ-PO, arXiv 2506.03690, and the published training code.
    """

    name: ClassVar[str] = "kl_authors"
    formula: ClassVar[str] = "as kl, by 20 steps of mirror descent over the batch + a random sample of the past"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690"

    sample: int = 256
    memory: int = 2048
    seed: int = 0

    @property
    def parts(self) -> Parts:
        """Mirror descent over a sample."""
        return Parts(MirrorDescent(), SampledPool(sample=self.sample, memory=self.memory, seed=self.seed))

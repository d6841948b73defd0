"""The KL margin of γ-PO: γ solves an allocation problem over current and recent reward margins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, require
from gamma_po.losses.base import Loss
from gamma_po.margins.base import Pool, PoolMargin
from gamma_po.margins.solver import solve_kl_margins
from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence


class History(NamedTuple):
    """The most recent reward margins of all ranks, oldest first."""

    reward_margin: Tensor  # [at most `history`], float64


@dataclass(frozen=True, kw_only=True)
class KL(PoolMargin):
    """γ-PO's margin: minimise mean[softplus(γ - h) + τ q log q] over γ = γ0 q, q >= 0, mean q = 1.

    The pool is this step's reward margins of all ranks plus the most recent `history` ones. Its mean γ is γ0,
    and max γ / min γ <= exp(γ0/τ), so γ0/τ is the knob that matters.

    How γ depends on the cut of a global batch: pairs are coupled only through one multiplier, which depends
    on the pool's distribution of h. Cutting a step into micro-batches changes who is in the pool at a time,
    never the rule.

    Args:
        gamma0: γ0 > 0, mean margin, reward units.
        tau: τ > 0, strength of the KL term; large τ gives γ0 to every pair.
        center: subtract γ0, so that a uniform margin leaves the loss unchanged. If not given: true with losses
            on log-ratio rewards (γ-DPO), false with SimPO (γ-SimPO).
        history: how many recent reward margins join the pool, >= 0.

    Source:
        γ-PO, arXiv 2506.03690, eqs. 8-10 and Algorithm 1; here solved exactly.
    """

    name: ClassVar[str] = "kl"
    formula: ClassVar[str] = "argmin over γ = γ0 q, mean q = 1: mean[softplus(γ-h) + τ q log q]; minus γ0 if centred"
    source: ClassVar[str] = "γ-PO, arXiv 2506.03690"

    gamma0: float = 1.0
    tau: float = 1.0
    center: bool | None = None
    history: int = 256

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.gamma0 > 0, "kl.gamma0", self.gamma0, "a number > 0")
        require(self.tau > 0, "kl.tau", self.tau, "a number > 0")
        require(self.history >= 0, "kl.history", self.history, "an integer >= 0")

    def bind(self, loss: Loss) -> KL:
        """Decide `center` by the loss where it was left open."""
        return self if self.center is not None else dataclasses.replace(self, center=loss.centers_kl)

    def init(self) -> History:
        """An empty history."""
        return History(torch.empty(0, dtype=torch.float64))

    def pool(self, reward_margin: Tensor, evidence: Evidence, state: History, ranks: Ranks) -> tuple[Pool, History]:
        """Solve over history and this step's margins of all ranks; the newest margins become history."""
        if self.center is None:
            raise ConfigError("kl.center is undecided: give center=True or center=False, or bind the margin to a loss")
        mine = reward_margin.detach().double()
        gathered = ranks.gather(mine)
        score = torch.cat([state.reward_margin.to(mine.device), gathered.values])
        solved = solve_kl_margins(score, gamma0=self.gamma0, tau=self.tau)
        target_margin = solved - self.gamma0 if self.center else solved
        start = state.reward_margin.shape[0] + gathered.start
        position = torch.arange(start, start + mine.shape[0], device=mine.device)
        recent = History(score[max(0, len(score) - self.history) :])
        return Pool(score, target_margin, position), recent

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, History]:
        """This rank's part of the solved pool."""
        pool, state = self.pool(reward_margin, evidence, state, ranks or Local())
        return pool.target_margin[pool.position].to(reward_margin.dtype), state

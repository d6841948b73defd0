"""β-DPO: β follows the batch, and pairs with unusual gaps are left out. The one loss with a state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import require, require_integer
from gamma_po.losses.base import Loss, PairwiseLoss, require_not_negative, require_positive
from gamma_po.losses.dpo import DPO
from gamma_po.losses.wrapped import Wrapper
from gamma_po.ranks import Local, Ranks
from gamma_po.state import Moments, float64, mean_and_std, no_moments, updated
from gamma_po.types import Evidence


class BetaState(NamedTuple):
    """What β-DPO remembers."""

    gap: Moments  # of the gaps, nats
    beta: Tensor  # [], float64, β of the last step
    steps: Tensor  # [], int64


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedPairs(Wrapper):
    """A loss with a weight for each pair of one step."""

    name: ClassVar[str] = "weighted_pairs"
    formula: ClassVar[str] = "w_i loss_i"
    source: ClassVar[str] = "one step of beta_dpo"

    loss: Loss
    weight: Tensor  # [P]

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """Weigh each pair."""
        return self.weight * self.loss(evidence, target_margin, ranks)


@dataclass(frozen=True, kw_only=True)
class BetaDPO(Wrapper):
    """β-DPO: loss with β_t = β (1 + α (mean kept gap - running mean)) over a kept share ρ of the step's pairs.

    The gap is h/β, for DPO the difference of log-ratios. Pairs are drawn without replacement with probability
    proportional to a Gaussian around the running mean; the others have no loss, and the kept ones count
    (pairs/kept) times, so that the mean is over them. β_t also scales the rewards that a margin sees.

    Pairs, mean and deviation are those of the micro-batch on all ranks, this step included: cutting a global batch
    into more micro-batches changes them, using more ranks does not. Evaluation takes all pairs, with β.

    Args:
        loss: a loss of h alone; its β is β.
        alpha: α >= 0, per nat.
        keep: ρ in (0, 1], share of the pairs that are kept; at least one is.
        decay: share of the running mean and deviation that a step keeps, in [0, 1).
        min_beta: β_t is at least this, > 0, reward units per nat.
        seed: of the draws, an integer, together with the step.

    Source:
        β-DPO, arXiv 2407.08639, with the gap in nats as in its authors' code; here with bias-corrected running
        statistics that validation never touches.
    """

    name: ClassVar[str] = "beta_dpo"
    formula: ClassVar[str] = "loss with β_t = β (1 + α (mean kept gap - running mean)), ρ of the pairs kept, gap = h/β"
    source: ClassVar[str] = "β-DPO, arXiv 2407.08639"
    beta_changes: ClassVar[bool] = True  # type: ignore[misc]

    loss: Loss = field(default_factory=DPO)
    alpha: float = 0.6
    keep: float = 0.8
    decay: float = 0.9
    min_beta: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        fits = isinstance(self.loss, PairwiseLoss) and self.loss.reward_scale is not None
        require(fits, "beta_dpo.loss", self.loss.name, "a loss of h alone with a beta (dpo, simpo, ipo, ...)")
        require_not_negative(self, "alpha")
        require(0 < self.keep <= 1, "beta_dpo.keep", self.keep, "0 < share <= 1")
        require(0 <= self.decay < 1, "beta_dpo.decay", self.decay, "0 <= decay < 1")
        require_positive(self, "min_beta")
        require_integer("beta_dpo.seed", self.seed)

    def of_pairs(self, evidence: Evidence, target_margin: Tensor, ranks: Ranks | None) -> Tensor:
        """The loss of all pairs with β, as evaluation wants it; training calls what `step` returns."""
        return self.loss(evidence, target_margin, ranks)

    def init(self) -> BetaState:
        """Nothing seen."""
        beta = torch.tensor(self.loss.reward_scale, dtype=torch.float64)
        return BetaState(no_moments(), beta, torch.zeros((), dtype=torch.int64))

    def report(self, state: BetaState) -> dict[str, Tensor]:
        """β_t."""
        return {"beta": state.beta.float()}

    def step(self, evidence: Evidence, state: BetaState, ranks: Ranks | None = None) -> tuple[Loss, BetaState]:
        """Look at the gaps of all ranks, choose pairs and β; every rank chooses the same."""
        base = self.loss.reward_scale
        assert base is not None
        margin = self.loss.rewards(evidence).margin
        gathered = (ranks or Local()).gather(float64(margin) / base)
        gap = gathered.values
        moments = updated(state.gap, gap, self.decay)
        mean, std = mean_and_std(moments)
        kept = kept_pairs(gap, mean, std, keep=self.keep, seed=self.seed * 1_000_003 + int(state.steps))
        beta = (base * (1 + self.alpha * (gap[kept].mean() - mean))).clamp_min(self.min_beta)
        weight = (kept.double() / kept.double().mean())[gathered.start : gathered.start + len(margin)]
        inner: Any = self.loss
        stepped = WeightedPairs(
            loss=dataclasses.replace(inner, beta=float(beta)), weight=weight.to(margin.dtype).to(margin.device)
        )
        return stepped, BetaState(moments, beta, state.steps + 1)


def kept_pairs(gap: Tensor, mean: Tensor, std: Tensor, *, keep: float, seed: int) -> Tensor:
    """Draw a share of the pairs without replacement, with probability ∝ exp(-((gap - mean)/std)²/2).

    The draw is a function of the seed and of the sorted gaps, so that the order of the pairs does not matter: the
    largest of log-probability + Gumbel noise are kept, which is that draw.

    Args:
        gap: [M], float64.
        mean: centre of the Gaussian, [].
        std: its width, []; 0 makes all pairs alike.
        keep: share, in (0, 1]; rounded to a number of pairs, at least one.
        seed: of the draw.

    Returns:
        [M], bool.

    >>> kept_pairs(torch.tensor([0.0, 100.0, 1.0]).double(), torch.tensor(0.0), torch.tensor(1.0), keep=0.67, seed=0)
    tensor([ True, False,  True])
    """
    z = torch.where(std > 0, (gap - mean) / std.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    uniform = torch.rand(len(gap), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = gap.argsort(stable=True)
    key = -z.square()[order] / 2 - torch.log(-torch.log(uniform.to(gap.device)))
    kept = torch.zeros(len(gap), dtype=torch.bool, device=gap.device)
    kept[order[key.topk(max(1, round(keep * len(gap)))).indices]] = True
    return kept

"""The open challenge: how much of what wrong labels cost can be had back without clean labels?

*What is attainable*: a label flipped with probability ε carries at most (1-2ε)² of the information of a clean one, so
DPO on that many times as many clean pairs stands on one side; on the other an ensemble over initial weights and batch
orders, which averages away what training adds, and the best linear average under the prior that gold rewards are drawn
from. *What was tried*: the likelihood of a mixture of right and wrong
labels (its gradient weighs each pair by the posterior that its label is right), and cross-fitting: networks that have
not seen a pair say how likely its label is right, and a last network learns from these soft labels, or from the pairs
that they agree with.
All of them are told ε; all but the linear average are tuned over β and learning rate on seeds of their own; compared at
equal KL.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gamma_po.progress import track
from gamma_po.schedules import warmup_then
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.linear_average import linear_average
from gamma_po.studies.measures import TEMPERATURES, Judge
from gamma_po.studies.methods import geometric
from gamma_po.studies.network import Network, Optimizer, gradients, initial, scores, with_constant
from gamma_po.studies.running import Row, measured
from gamma_po.studies.study import Study, compare, reference_check
from gamma_po.studies.training import Training, batch_rows
from gamma_po.studies.worlds import TUNING_SEED, HeldOut, Pairs, Worlds, labels

Pull = Callable[[Tensor, Tensor, float], Tensor]  # h of first over second, P(first preferred), ε -> ∂loss/∂h
FOLDS = 4
UNTUNED = (1.0, 0.0)  # β and learning rate of what has neither


class Job(NamedTuple):
    """Networks to train: W worlds × `members` with random numbers of their own, each at S configurations."""

    worlds: Worlds
    target: Tensor  # [W, N] probability with which `first` is preferred
    keep: Tensor  # [W, members, N] bool: which pairs each member trains on
    beta: Tensor  # [S]
    learning_rate: Tensor  # [S]
    flip_rate: float
    how: Training
    label_gap: float = 2.0


def logistic_pull(h: Tensor, target: Tensor, flip_rate: float) -> Tensor:
    """∂/∂h of DPO's loss with soft labels, -q log s(h) - (1-q) log s(-h); ε is not used."""
    return torch.sigmoid(h) - target


def mixture_pull(h: Tensor, target: Tensor, flip_rate: float) -> Tensor:
    """∂/∂h of -log[(1-ε) s(±h) + ε s(∓h)], the likelihood of a label that is wrong with probability ε."""
    sign = 2 * target - 1
    p = torch.sigmoid(sign * h)
    return -sign * (1 - 2 * flip_rate) * p * (1 - p) / ((1 - flip_rate) * p + flip_rate * (1 - p))


def train_members(job: Job, pull: Pull) -> Network:
    """Train all networks, [W · members, S, ...]; members of a world lie side by side."""
    members, count = job.keep.shape[1], job.keep.shape[2]
    seeds = tuple(1000 * seed + member for seed in job.worlds.seed for member in range(members))
    order = batch_rows(seeds, count, job.how)
    network = initial(seeds, len(job.beta), job.worlds.pairs.first.shape[2], job.how.units)
    optimizer = Optimizer(network, job.learning_rate)
    factor = warmup_then("cosine", total_steps=job.how.steps, warmup_ratio=job.how.warmup_ratio)
    world = torch.arange(len(job.worlds)).repeat_interleave(members)[:, None]
    keep = job.keep.flatten(0, 1).float()
    sides = [with_constant(x) for x in job.worlds.pairs[:2]]
    for step in range(job.how.steps):
        rows = order[:, step]
        x = torch.cat([side[world, rows] for side in sides], dim=1)
        first, second = scores(network, x).chunk(2, dim=2)
        h = job.beta[None, :, None] * (first - second)
        weight = keep.gather(1, rows)
        weight = (weight / weight.sum(1, keepdim=True).clamp_min(1))[:, None]
        of_first = pull(h, job.target[world, rows][:, None], job.flip_rate) * weight * job.beta[None, :, None]
        optimizer.step(gradients(network, x, torch.cat([of_first, -of_first], dim=2)), factor(step))
    return network


def mean_scores(network: Network, x: Tensor, members: int) -> Tensor:
    """Average f over the members of each world; x [W, B, F] -> [W, S, B]."""
    found = scores(network, with_constant(x).repeat_interleave(members, 0))
    return found.unflatten(0, (-1, members)).mean(1)


def networks(job: Job, contender: Contender, x: Tensor) -> Tensor:
    """Train, and score responses; x [W, B, F] -> [W, S, B]."""
    return mean_scores(train_members(job, contender.pull), x, contender.members)


def best_linear(job: Job, contender: Contender, x: Tensor) -> Tensor:
    """Score responses by `linear_average`, alike for every configuration; x [W, B, F] -> [W, S, B]."""
    found = []
    for world, (first, second) in enumerate(zip(*job.worlds.pairs[:2], strict=True)):
        own, label = job.keep[world, 0], 2 * job.target[world] - 1
        how = {"flip_rate": job.flip_rate, "gap": job.label_gap}
        found.append(linear_average(first[own], second[own], label[own], x[world], **how))
    return torch.stack(found)[:, None].expand(-1, len(job.beta), -1)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to learn from noisy pairs.

    Args:
        name: in the tables.
        learn: scores responses after learning from a job's pairs; `networks` has options to tune, `best_linear` none.
        members: networks whose scores are averaged.
        pull: of the loss.
        pairs: "noisy"; "unflipped", the oracle that leaves flipped pairs out; or "few clean": (1-2ε)² of them.
        teacher: None, or what is made of the cross-fitted scores: soft labels, or the pairs that they agree with.
    """

    name: str
    learn: Callable[[Job, Contender, Tensor], Tensor] = networks
    members: int = 1
    pull: Pull = logistic_pull
    pairs: str = "noisy"
    teacher: str | None = None


CONTENDERS = (
    Contender(name="dpo"),
    Contender(name="ensemble of 8", members=8),
    Contender(name="dpo on (1-2ε)² as many clean pairs", pairs="few clean"),
    Contender(name="ensemble of 8 on (1-2ε)² as many clean pairs", members=8, pairs="few clean"),
    Contender(name="oracle: no flipped pairs", pairs="unflipped"),
    Contender(name="oracle, ensemble of 8", members=8, pairs="unflipped"),
    Contender(name="best linear average, prior known", learn=best_linear),
    Contender(name="oracle, best linear average, prior known", learn=best_linear, pairs="unflipped"),
    Contender(name="mixture likelihood", pull=mixture_pull),
    Contender(name="cross-fitted soft labels", teacher="soft"),
    Contender(name="cross-fitted agreement", teacher="agreement"),
    Contender(name="cross-fitted soft labels, ensemble of 8", members=8, teacher="soft"),
)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """The protocol's numbers.

    Args:
        testbed: S1.
        seeds: for the comparison.
        tuning_seeds: how many others for tuning.
        rhos: references.
        flips: flip rates, > 0.
        betas: tuned.
        learning_rates: tuned.
        kls: the first is that of tuning and comparison.
        margin: smallest difference of interest, of win rates.
        training: steps, batch, schedule.
    """

    testbed: Bandit
    seeds: tuple[int, ...]
    tuning_seeds: int = 6
    rhos: tuple[float, ...] = (0.5,)
    flips: tuple[float, ...] = (0.4,)
    betas: tuple[float, ...] = geometric(0.00125, 4, 7)
    learning_rates: tuple[float, ...] = geometric(0.0005, 2, 7)
    kls: tuple[float, ...] = (1.0, 0.25, 0.5, 2.0)
    margin: float = 0.01
    training: Training = dataclasses.field(default_factory=Training)

    def run(self, *, workers: int, visible: bool = True) -> Study:
        """Tune and compare all contenders, one after the other in this process; `workers` is not needed."""
        rows: list[Row] = []
        tuned: list[Row] = []
        cells = [(rho, flips) for rho in self.rhos for flips in self.flips]
        todo = [(cell, contender) for cell in cells for contender in CONTENDERS]
        teachers: dict[tuple[float, float], tuple[float, float]] = {}
        for (rho, flips), contender in track(todo, "contenders", visible=visible):
            teacher = teachers.get((rho, flips))
            seeds = tuple(range(TUNING_SEED, TUNING_SEED + self.tuning_seeds))
            best = UNTUNED
            if contender.learn is networks:
                grid = [(beta, rate) for beta in self.betas for rate in self.learning_rates]
                found = self._measured(contender, seeds, rho, flips, grid, teacher)
                metric = f"win_rate_kl{self.kls[0]:g}"
                means = [_mean([row[metric] for row in found if row["configuration"] == n]) for n in range(len(grid))]
                best = grid[max(range(len(grid)), key=means.__getitem__)]
                tuned.append(_tuned_row(contender, rho, flips, best, self, max(means)))
                rows += [{"stage": "tuning"} | row for row in found]
            if contender.name == "dpo":
                teachers[rho, flips] = best
            final = self._measured(contender, self.seeds, rho, flips, [best], teacher)
            rows += [{"stage": "evaluation"} | row for row in final]
        metrics = (f"win_rate_kl{self.kls[0]:g}",)
        against = {contender.name: ("dpo",) for contender in CONTENDERS[1:]}
        final = [row for row in rows if row["stage"] == "evaluation"]
        return Study(
            title=f"the open challenge: tuned on {self.tuning_seeds} other seeds, compared at KL {self.kls[0]:g}",
            config=self.config(), metrics=metrics, rows=rows, tuned=tuned,
            pairings=compare(final, against, metrics, self.margin),
            checks=reference_check(rows),
            levels=("right_labels", "pair_accuracy"),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The resolved numbers."""
        return {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def _measured(
        self, contender: Contender, seeds: Sequence[int], rho: float, flips: float,
        grid: Sequence[tuple[float, float]], teacher: tuple[float, float] | None,
    ) -> list[Row]:  # fmt: skip
        worlds = self.testbed.draw(seeds, (rho,))
        job = self._job(contender, worlds, flips, grid)
        if contender.teacher is not None:
            assert teacher is not None, "the tuned DPO, which teaches, comes first"
            job = taught(job, contender.teacher, teacher)
        held_out = worlds.held_out
        f = contender.learn(job, contender, held_out.features.flatten(1, 2))
        right = ((job.target > 0.5) == job.worlds.pairs.first_preferred)[:, None].expand_as(job.keep)
        share = (right & job.keep).sum((1, 2)) / job.keep.sum((1, 2))
        rows = []
        for world, seed in enumerate(worlds.seed):
            judge = Judge(HeldOut(*(values[world] for values in held_out)))
            own = f[world].unflatten(1, held_out.gold.shape[1:])
            values = measured(judge, own, self.kls)
            for number, (beta, rate) in enumerate(grid):
                row = {"arm": contender.name, "seed": seed, "rho": rho, "flip_rate": flips, "configuration": number}
                row |= {"beta": beta, "learning_rate": rate, "right_labels": float(share[world])}
                rows.append(row | {name: float(value[number]) for name, value in values.items()})
        return rows

    def _job(self, contender: Contender, worlds: Worlds, flips: float, grid: Sequence[tuple[float, float]]) -> Job:
        found = labels(worlds.pairs, flips)
        count = found.flipped.shape[1]
        how, first = self.training, found.first_chosen
        keep = torch.ones_like(first)
        if contender.pairs == "unflipped":
            keep = ~found.flipped
        if contender.pairs == "few clean":
            few = round((1 - 2 * flips) ** 2 * count)
            how = dataclasses.replace(how, batch=min(how.batch, few))
            worlds = Worlds(Pairs(*(values[:, :few] for values in worlds.pairs)), *worlds[1:])
            first, keep = worlds.pairs.first_preferred, keep[:, :few]
        members = keep[:, None].expand(-1, contender.members, -1)
        beta, rate = torch.tensor(grid).T
        left = flips if contender.pairs == "noisy" else 0.0
        return Job(worlds, first.float(), members, beta, rate, left, how, self.testbed.label_gap)


def taught(job: Job, kind: str, teacher: tuple[float, float]) -> Job:
    """Replace labels by what networks that have not seen them make of them.

    Args:
        job: whose labels and pairs are replaced.
        kind: "soft": the posterior that the label is right; "agreement": leave out pairs that are likelier wrong.
        teacher: β and learning rate of the networks.
    """
    count = job.target.shape[1]
    fold = torch.arange(count) % FOLDS
    keep = torch.stack([fold != number for number in range(FOLDS)])[None].expand(len(job.target), -1, -1)
    beta, rate = (torch.tensor([value]) for value in teacher)
    network = train_members(job._replace(keep=keep, beta=beta, learning_rate=rate), logistic_pull)
    pairs = job.worlds.pairs
    first, second = (scores(network, with_constant(x).repeat_interleave(FOLDS, 0))[:, 0] for x in pairs[:2])
    f = (first - second).unflatten(0, (-1, FOLDS)).gather(1, fold.expand(len(job.target), 1, -1))[:, 0]
    signed = torch.where(job.target > 0.5, f, -f)
    right = posterior_right(signed, job.flip_rate).float()
    if kind == "agreement":
        return job._replace(keep=job.keep & (right > 0.5)[:, None])
    return job._replace(target=torch.where(job.target > 0.5, right, 1 - right))


def posterior_right(signed: Tensor, flip_rate: float) -> Tensor:
    """Return P(label right | scores) of a mixture of right and wrong labels; [W, N] -> [W, N].

    A right label has likelihood s(c d), d the score of the chosen minus the rejected response; c by maximum likelihood.
    """
    scaled = signed.double() / signed.double().square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    tried = torch.stack([torch.sigmoid(c * scaled) for c in TEMPERATURES])
    likelihood = ((1 - flip_rate) * tried + flip_rate * (1 - tried)).log().mean(2)
    p = tried[likelihood.argmax(0), torch.arange(len(signed))]
    return (1 - flip_rate) * p / ((1 - flip_rate) * p + flip_rate * (1 - p))


def _tuned_row(
    contender: Contender, rho: float, flips: float, best: tuple[float, float], how: Challenge, value: float
) -> Row:
    axes = {"beta": how.betas, "learning_rate": how.learning_rates}
    options = dict(zip(axes, best, strict=True))
    edges = "; ".join(f"{name}={v:.3g}" for name, v in options.items() if v in (axes[name][0], axes[name][-1]))
    tried = len(how.betas) * len(how.learning_rates)
    return {
        "arm": contender.name, "rho": rho, "flip_rate": flips, "configurations": tried, "options": options,
        "at_edge": edges, "tuning_win_rate": value,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return mean if mean == mean else -math.inf

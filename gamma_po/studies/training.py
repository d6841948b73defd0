"""All runs of a study in one batched program, on the project's own losses, margins and solver.

Losses are elementwise in the pairs and margins allocate along the first dimension, so both take the pairs of
many runs at once: `[B, runs]` instead of `[B]`. Settings with equal loss and margin go through one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.losses import gradient_weight
from gamma_po.margins import Margin, NoMargin, Shuffled
from gamma_po.schedules import warmup_then
from gamma_po.studies.network import Network, Optimizer, gradients, initial, scores, with_constant
from gamma_po.studies.normaliser import Normalised, add_gradient, normalised, with_normaliser
from gamma_po.studies.settings import Setting, needs_normaliser
from gamma_po.studies.worlds import Labels, Worlds, generator_of, labels, reference_logps
from gamma_po.types import Evidence, PairLogps

Track = Callable[[Iterable[int]], Iterator[int]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How every run is trained.

    Args:
        steps: optimizer steps.
        batch: pairs per step.
        warmup_ratio: of the steps; then a cosine to zero.
        units: of the policy's hidden layer.
        snapshot_every: steps between records of h, γ and gradient weights; the last step is always recorded.
    """

    steps: int = 200
    batch: int = 64
    warmup_ratio: float = 0.1
    units: int = 64
    snapshot_every: int = 10


class Snapshots(NamedTuple):
    """What training looked like, T records of B pairs."""

    step: tuple[int, ...]  # [T]
    reward_margin: Tensor  # [T, B, S, W] h
    target_margin: Tensor  # [T, B, S, W] γ
    weight: Tensor  # [T, B, S, W] gradient weight, 0 for masked pairs
    flipped: Tensor  # [T, B, S, W] bool
    wrong: Tensor  # [T, B, S, W] bool


class Trained(NamedTuple):
    """The result of training."""

    network: Network
    snapshots: Snapshots


class Group(NamedTuple):
    """Neighbouring settings with equal loss and margin."""

    members: slice
    setting: Setting
    gamma: Tensor | None  # [W, G, N] of a margin known before training


def ordered(settings: Sequence[Setting]) -> list[Setting]:
    """Put settings with equal loss and margin side by side, those that need log Z last; else keep their order."""
    keys: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings:
        keys.setdefault((repr(setting.loss), repr(setting.margin)), []).append(setting)
    groups = sorted(keys.values(), key=lambda group: needs_normaliser(group[0].loss))
    return [setting for group in groups for setting in group]


def train(worlds: Worlds, settings: Sequence[Setting], how: Training, track: Track = iter) -> Trained:
    """Train every setting in every world.

    Args:
        worlds: W of them.
        settings: S of them, as put in order by `ordered`.
        how: steps, batch, schedule.
        track: wraps the range of steps, e.g. with a progress bar.

    Returns:
        Networks [W, S, ...] and snapshots.
    """
    by_rate = {rate: labels(worlds.pairs, rate) for rate in {setting.flip_rate for setting in settings}}
    batches = batch_rows(worlds.seed, worlds.pairs.first.shape[1], how)
    network = initial(worlds.seed, len(settings), worlds.pairs.first.shape[2], how.units)
    optimizer = Optimizer(network, torch.tensor([setting.learning_rate for setting in settings]))
    factor = warmup_then("cosine", total_steps=how.steps, warmup_ratio=how.warmup_ratio)
    groups = list(_groups(worlds, settings, by_rate))
    margins = [group.setting.margin.bind(group.setting.loss) for group in groups]
    states = [margin.init() for margin in margins]
    first, second = with_constant(worlds.pairs.first), with_constant(worlds.pairs.second)
    alone, whole = with_normaliser(settings), None
    records, at = [], []
    for step in track(range(how.steps)):
        rows = batches[:, step]
        world = torch.arange(len(worlds))[:, None]
        x = torch.cat([first[world, rows], second[world, rows]], dim=1)
        if alone.start < alone.stop:
            whole = normalised(network, alone, worlds.pairs, rows)
        batch = _Batch(worlds, settings, by_rate, rows, scores(network, x), whole)
        keep = (step + 1) % how.snapshot_every == 0 or step + 1 == how.steps
        snapshot = []
        for number, (group, margin) in enumerate(zip(groups, margins, strict=True)):
            gamma, states[number] = _target_margin(group, margin, batch, states[number])
            batch.add_loss(group, gamma)
            if keep:
                snapshot.append(batch.snapshot(group, gamma))
        optimizer.step(batch.gradient(network, x), factor(step))
        if keep:
            at.append(step + 1)
            records.append([torch.cat(field, dim=1) for field in zip(*snapshot, strict=True)])
    fields = [torch.stack(field) for field in zip(*records, strict=True)]
    return Trained(network, Snapshots(tuple(at), *fields))


class _Batch:
    """One step's pairs of all runs; tensors are [B, S, W]."""

    def __init__(
        self,
        worlds: Worlds,
        settings: Sequence[Setting],
        by_rate: dict[float, Labels],
        rows: Tensor,
        found: Tensor,
        whole: Normalised | None,
    ) -> None:
        self.rows, self.whole = rows, whole
        world = torch.arange(len(worlds))[:, None]
        picked = {rate: Labels(*(field[world, rows].T for field in value)) for rate, value in by_rate.items()}
        chosen, self.flipped, self.wrong = (
            torch.stack([getattr(picked[setting.flip_rate], name) for setting in settings], dim=1)
            for name in Labels._fields
        )
        masked = torch.tensor([setting.mask == "flipped" for setting in settings])[:, None]
        self.keep = (~(masked & self.flipped)).float()
        self.per_pair = torch.zeros_like(self.keep)
        first, second = found.permute(2, 1, 0).chunk(2)
        self.first_chosen = chosen
        self.chosen = torch.where(chosen, first, second).requires_grad_()
        self.rejected = torch.where(chosen, second, first).requires_grad_()
        reference = [field[world, rows].T[:, None] for field in worlds.pairs[2:4]]
        self.reference = (torch.where(chosen, *reference), torch.where(chosen, *reversed(reference)))
        self.losses: list[Tensor] = []

    def evidence(self, group: Group) -> Evidence:
        """What losses and margins see: [B, G, W] each. log Z is left out where it cancels."""
        members = (slice(None), group.members)
        reference_chosen, reference_rejected = (side[members] for side in self.reference)
        one = torch.ones_like(reference_chosen)
        policy = (reference_chosen + self.chosen[members], reference_rejected + self.rejected[members])
        if self.whole is not None and needs_normaliser(group.setting.loss):
            own = slice(*(end - self.whole.members.start for end in (group.members.start, group.members.stop)))
            policy = (policy[0] - self.whole.log_z[:, own], policy[1] - self.whole.log_z[:, own])
        return Evidence(
            PairLogps(*policy, one, one),
            PairLogps(reference_chosen, reference_rejected, one, one),
        )

    def add_loss(self, group: Group, gamma: Tensor) -> None:
        """Compute the losses of a group: per run the mean over the pairs that are not masked."""
        keep = self.keep[:, group.members]
        per_pair = group.setting.loss(self.evidence(group), gamma)
        self.losses.append(((per_pair * keep).sum(0) / keep.sum(0).clamp_min(1)).sum())

    def gradient(self, network: Network, x: Tensor) -> Network:
        """∂(sum of all runs' losses)/∂parameters; `x` holds the features of the first responses, then of the second."""
        leaves = [self.chosen, self.rejected] if self.whole is None else [self.chosen, self.rejected, self.whole.log_z]
        of_chosen, of_rejected, *of_log_z = torch.autograd.grad(torch.stack(self.losses).sum(), leaves)
        first = torch.where(self.first_chosen, of_chosen, of_rejected)
        second = torch.where(self.first_chosen, of_rejected, of_chosen)
        found = gradients(network, x, torch.cat([first, second]).permute(2, 1, 0).contiguous())
        if self.whole is not None:
            add_gradient(found, network, self.whole, of_log_z[0])
        return found

    def snapshot(self, group: Group, gamma: Tensor) -> list[Tensor]:
        """h, γ, gradient weight, flipped, wrong: [B, G, W] each."""
        evidence, members = self.evidence(group).map(Tensor.detach), (slice(None), group.members)
        h = group.setting.loss.rewards(evidence).margin
        weight = gradient_weight(group.setting.loss, evidence, gamma) * self.keep[members]
        return [h, gamma.expand_as(h), weight, self.flipped[members], self.wrong[members]]


def _target_margin(group: Group, margin: Margin, batch: _Batch, state: object) -> tuple[Tensor, object]:
    """γ of a group's pairs, [B, G, W]: looked up, or from the margin's own rule with its state."""
    if group.gamma is not None:
        world = torch.arange(group.gamma.shape[0])[:, None]
        return group.gamma[world, :, batch.rows].permute(1, 2, 0), state
    evidence = batch.evidence(group).map(Tensor.detach)
    return margin(group.setting.loss.rewards(evidence).margin, evidence, state)


def _groups(worlds: Worlds, settings: Sequence[Setting], by_rate: dict[float, Labels]) -> Iterator[Group]:
    start = 0
    tables: dict[tuple[str, float], Tensor] = {}
    while start < len(settings):
        setting = settings[start]
        same = (setting.loss, setting.margin)
        stop = next((i for i in range(start, len(settings)) if (settings[i].loss, settings[i].margin) != same), None)
        members = slice(start, len(settings) if stop is None else stop)
        gamma = None
        if setting.is_static:
            for rate in {member.flip_rate for member in settings[members]}:
                if (key := (repr(setting.margin), rate)) not in tables:
                    tables[key] = known_margins(setting, worlds, by_rate[rate])
            gamma = torch.stack([tables[repr(setting.margin), m.flip_rate] for m in settings[members]], dim=1)
        yield Group(members, setting, gamma)
        start = members.stop


def known_margins(setting: Setting, worlds: Worlds, found: Labels) -> Tensor:
    """Return γ of all training pairs from a margin that does not read the policy, [W, N]: fit and applied per world."""
    reference = reference_logps(worlds.pairs, found.first_chosen)
    if isinstance(setting.margin, NoMargin):
        return torch.zeros_like(reference.chosen)
    table = []
    for world, seed in enumerate(worlds.seed):
        margin = setting.margin
        if isinstance(margin, Shuffled):
            margin = dataclasses.replace(margin, seed=margin.seed + seed)
        own = PairLogps(*(field[world] for field in reference[:4]))
        state = margin.fit(own) if margin.needs_fit else margin.init()
        table.append(margin(torch.zeros_like(own.chosen), Evidence(own, own), state)[0])
    return torch.stack(table)


def batch_rows(seeds: tuple[int, ...], pairs: int, how: Training) -> Tensor:
    """Rows of every step, [W, steps, B]: epochs in an order of the seed's own, the last incomplete batch dropped."""
    per_epoch = pairs // how.batch
    epochs = -(-how.steps // per_epoch)
    orders = []
    for seed in seeds:
        generator = generator_of(seed, 2)
        rows = [torch.randperm(pairs, generator=generator)[: per_epoch * how.batch] for _ in range(epochs)]
        orders.append(torch.cat(rows).view(-1, how.batch)[: how.steps])
    return torch.stack(orders)

"""What a bandit study is run on: worlds with preference pairs to learn from and held-out prompts to measure on.

A *world* is one seed with one reference; `W` worlds lie side by side in every tensor. `N` pairs to train on,
`M` held-out prompts with `K` responses each, `F` features per response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.types import PairLogps

TUNING_SEED = 1_000_000  # tuning seeds start here, evaluation seeds at 0


class Pairs(NamedTuple):
    """Training pairs; `first` and `second` are in random order, the label says which is preferred."""

    first: Tensor  # [W, N, F] features
    second: Tensor  # [W, N, F]
    reference_first: Tensor  # [W, N] log π_ref, nats
    reference_second: Tensor  # [W, N]
    first_better: Tensor  # [W, N] bool: the gold reward's order
    first_preferred: Tensor  # [W, N] bool: the label before flips
    coin: Tensor  # [W, N] uniform: the label is flipped where it is below the flip rate
    responses: Tensor  # [W, N, K, F] features of all responses to the pair's prompt
    reference: Tensor  # [W, N, K] log π_ref, nats; -inf for a response that does not exist


class HeldOut(NamedTuple):
    """Prompts for exact sums over all their responses; a response that does not exist has reference -inf."""

    features: Tensor  # [W, M, K, F]
    reference: Tensor  # [W, M, K] log π_ref, nats
    gold: Tensor  # [W, M, K]


class Worlds(NamedTuple):
    """W worlds; runs are paired by `seed`, compared for each `rho`."""

    pairs: Pairs
    held_out: HeldOut
    seed: tuple[int, ...]
    rho: tuple[float, ...]
    calibration: Pairs | None = None  # pairs of other prompts, on which an option may be chosen

    def __len__(self) -> int:
        return len(self.seed)


class Labels(NamedTuple):
    """The labels of the training pairs at one flip rate."""

    first_chosen: Tensor  # [W, N] bool: as the learner sees it
    flipped: Tensor  # [W, N] bool: the flip's doing
    wrong: Tensor  # [W, N] bool: against the gold order, by the annotator's noise or by a flip


def labels(pairs: Pairs, flip_rate: float) -> Labels:
    """Flip labels; the pairs flipped at a low rate are among those flipped at a higher one."""
    flipped = pairs.coin < flip_rate
    first_chosen = pairs.first_preferred ^ flipped
    return Labels(first_chosen, flipped, first_chosen != pairs.first_better)


def reference_logps(pairs: Pairs, first_chosen: Tensor) -> PairLogps:
    """Return the reference's log-probabilities as labelled, [W, N] each; every response has length 1."""
    chosen = torch.where(first_chosen, pairs.reference_first, pairs.reference_second)
    rejected = torch.where(first_chosen, pairs.reference_second, pairs.reference_first)
    return PairLogps(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected))


def reference_accuracy(pairs: Pairs) -> Tensor:
    """Share of training pairs that the reference orders as the gold reward does, [W]."""
    return ((pairs.reference_first > pairs.reference_second) == pairs.first_better).double().mean(1)


def generator_of(seed: int, stream: int = 0) -> torch.Generator:
    """Return the random numbers of a seed: stream 0 draws its world, 1 its networks, 2 its batches."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + stream)


def draw_worlds(seeds: Sequence[int], rhos: Sequence[float], world: Callable[[int, float], Worlds]) -> Worlds:
    """Return a world for every seed and ρ, drawn one by one.

    Raises:
        ConfigError: a ρ outside of [0, 1].
    """
    for rho in rhos:
        require(0 <= rho <= 1, "rho", rho, "0 <= ρ <= 1")
    return joined([world(seed, rho) for seed in seeds for rho in rhos])


def informed_scores(gold: Tensor, nuisance: Tensor, rho: float, sharpness: float) -> Tensor:
    """Return the reference's log-probabilities before normalisation; gold and nuisance are standardised."""
    return sharpness * (rho * gold + math.sqrt(1 - rho**2) * nuisance)


def joined(worlds: list[Worlds]) -> Worlds:
    """Put worlds of equal sizes side by side."""
    pairs = Pairs(*(torch.cat(field) for field in zip(*(w.pairs for w in worlds), strict=True)))
    held_out = HeldOut(*(torch.cat(field) for field in zip(*(w.held_out for w in worlds), strict=True)))
    seeds, rhos = (sum((getattr(w, name) for w in worlds), ()) for name in ("seed", "rho"))
    if worlds[0].calibration is None:
        return Worlds(pairs, held_out, seeds, rhos)
    fields = zip(*(w.calibration for w in worlds if w.calibration is not None), strict=True)
    return Worlds(pairs, held_out, seeds, rhos, Pairs(*map(torch.cat, fields)))


def preference_pairs(
    features: Tensor, reference: Tensor, gold: Tensor, label_gap: float, generator: torch.Generator
) -> Pairs:
    """Draw a pair of distinct responses from π_ref for every prompt, and Bradley-Terry labels.

    P(first preferred) = s(label_gap (gold_first - gold_second)).

    Args:
        features: [N, K, F].
        reference: log π_ref, [N, K]; -inf for a response that does not exist.
        gold: [N, K].
        label_gap: how sharply the annotator sees gold differences.
        generator: of all draws.

    Returns:
        Pairs of one world.
    """
    gumbel = -torch.log(-torch.log(torch.rand(reference.shape, generator=generator).clamp(1e-12, 1 - 1e-7)))
    drawn = (reference + gumbel).topk(2, dim=1).indices  # two draws without replacement (Gumbel top-2)
    swap = torch.rand(len(drawn), generator=generator) < 0.5
    drawn = torch.where(swap[:, None], drawn.flip(1), drawn)
    rows = torch.arange(len(drawn))
    first, second = drawn.T
    gap = gold[rows, first] - gold[rows, second]
    preferred = torch.rand(len(drawn), generator=generator) < torch.sigmoid(label_gap * gap)
    coin = torch.rand(len(drawn), generator=generator)
    fields = (
        features[rows, first], features[rows, second], reference[rows, first], reference[rows, second],
        gap > 0, preferred, coin, features, reference,
    )  # fmt: skip
    return Pairs(*(field[None] for field in fields))

"""How often the reference already ranks a pair right, on a seeded sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.data.dataset import Example, PairDataset, Slot
from gamma_po.evaluation.intervals import Estimate, clustered_share
from gamma_po.evaluation.pairs import preferred
from gamma_po.inspection.findings import Finding
from gamma_po.types import PairLogps, PreferenceBatch

CHANCE = 0.5


class ReferenceAccuracy(NamedTuple):
    """Shares of pairs, as labelled for training, with a positive log-probability margin of the reference."""

    num_pairs: int
    raw: Estimate  # of summed log-probabilities
    length_normalised: Estimate  # of log-probabilities per token
    chosen_longer: Estimate  # the share a judge would get who prefers the longer completion; ties 1/2
    seconds_per_pair: float
    finite: bool


def sample_order(num_pairs: int, seed: int) -> list[int]:
    """Return all rows in a random order that depends on the seed alone."""
    return torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed)).tolist()


def as_examples(dataset: PairDataset, rows: Sequence[int]) -> list[Example]:
    """Return rows as training sees them."""
    return [dataset[Slot(row)] for row in rows]


def reference_accuracy(
    dataset: PairDataset,
    prompts: Sequence[object],
    score: Callable[[PreferenceBatch], PairLogps],
    collate: Callable[[Sequence[Example]], PreferenceBatch],
    *,
    sample: int,
    batch_size: int,
    seed: int,
    seconds: float,
) -> ReferenceAccuracy:
    """Score a seeded sample under the reference, as many pairs as the time allows.

    Args:
        dataset: the training pairs.
        prompts: those of its rows; equal ones form a cluster.
        score: the reference, without gradient.
        collate: lays examples out for it.
        sample: pairs at most.
        batch_size: pairs per forward.
        seed: of the sample.
        seconds: no further batch starts after this time.
    """
    rows = sample_order(len(dataset), seed)[:sample]
    parts: list[PairLogps] = []
    order: list[int] = []  # a batch that is cut into forwards has its pairs by length
    scored, began = 0, time.perf_counter()
    while scored < len(rows) and (scored == 0 or time.perf_counter() - began < seconds):
        batch = collate(as_examples(dataset, rows[scored : scored + batch_size]))
        parts.append(score(batch))
        order += batch.index.tolist()
        scored += batch.num_pairs
    elapsed = time.perf_counter() - began
    raw = torch.cat([part.margin.float().cpu() for part in parts])
    mean = torch.cat([(part.mean_chosen - part.mean_rejected).float().cpu() for part in parts])
    longer = torch.cat([(part.chosen_length - part.rejected_length).float().cpu() for part in parts])
    clusters = _clusters([prompts[row] for row in order])
    return ReferenceAccuracy(
        num_pairs=scored,
        raw=clustered_share(preferred(raw), clusters),
        length_normalised=clustered_share(preferred(mean), clusters),
        chosen_longer=clustered_share(preferred(longer), clusters),
        seconds_per_pair=elapsed / scored,
        finite=bool(torch.isfinite(raw).all()),
    )


def reference_findings(found: ReferenceAccuracy) -> list[Finding]:
    """Judge the reference's log-probabilities of the sample."""
    if not found.finite:
        change = "look at the rows and at the model's dtype; data.invalid_rows: drop removes empty completions"
        return [Finding("fails", "the reference's log-probabilities are not finite", change)]
    if found.raw.high < CHANCE and found.length_normalised.high < CHANCE:
        problem = (
            f"the reference ranks pairs the wrong way round more often than by chance (raw {found.raw}, "
            f"length-normalised {found.length_normalised})"
        )
        change = "check that data.columns.chosen and rejected are not exchanged, and the labels of a few pairs"
        return [Finding("likely wrong", problem, change)]
    return []


def _clusters(prompts: Sequence[object]) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(repr(prompt), len(numbers)) for prompt in prompts])

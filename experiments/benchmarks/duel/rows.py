"""Which pairs are trained on: the same ones in every arm, and as padded as batches of the whole file are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from gamma_po.data.formatting import Columns, Preference, read_preferences
from gamma_po.data.loader import ShuffledBatches
from gamma_po.data.tokenization import Tokenization, TokenizedPair, tokenize_preferences
from gamma_po.errors import DataError

DRAWS = 300
WARM_UP = 2

Batches = list[list[int]]


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def real(self) -> int:
        """Tokens of both sequences."""
        return 2 * self.prompt + self.chosen + self.rejected

    @property
    def row(self) -> int:
        """Tokens of the longer sequence."""
        return self.prompt + max(self.chosen, self.rejected)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Rows of the pool for each step: the shortest pairs to start with, the first measured batch, the measured ones."""

    shuffled: Batches
    grouped: Batches


def read_pool(source: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[Preference], list[Lengths]]:
    """Read a preference file and count its tokens; rows that cannot be used are left out."""
    preferences, _ = read_preferences(source, Columns(), invalid_rows="drop", limit=limit)
    pairs, kept, _ = tokenize_preferences(preferences, tokenizer, Tokenization(), show_progress=False)
    return [preferences[i] for i in kept], [lengths_of(pair) for pair in pairs]


def lengths_of(pair: TokenizedPair) -> Lengths:
    """Count the tokens of a pair."""
    return Lengths(len(pair.prompt), len(pair.chosen), len(pair.rejected))


def padded_tokens(batches: Batches, lengths: Sequence[Lengths]) -> float:
    """Tokens per pair, padding included, where each batch is padded to its longest sequence."""
    total = sum(2 * len(batch) * max(lengths[i].row for i in batch) for batch in batches)
    return total / sum(map(len, batches))


def cut(order: Sequence[int], batch_size: int) -> Batches:
    """Whole batches of an order."""
    return [list(order[i : i + batch_size]) for i in range(0, len(order) - batch_size + 1, batch_size)]


def choose_rows(lengths: Sequence[Lengths], *, batch_size: int, steps: int, seed: int) -> Chosen:
    """Choose measured batches that stand for the file.

    Length grouping pays because it looks at 50 batches at a time, far more than are measured here. So the file is
    grouped as TRL would (transformers' own function); one grouped batch is drawn from each of `steps` strata of
    length; and the rows of these batches at random are the batches of all other arms. Of many draws the one is
    taken whose tokens per pair (real, padded at random, padded when grouped) come closest to the whole file's.

    Args:
        lengths: of the pool.
        batch_size: pairs per step.
        steps: measured.
        seed: of every draw.

    Raises:
        DataError: the pool is too small.
    """
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    needed = 2 * steps * batch_size
    if len(lengths) < needed:
        raise DataError(
            f"{steps} steps of {batch_size} pairs need a file of at least {needed} pairs, not {len(lengths)}"
        )
    row_lengths = [pair.row for pair in lengths]
    grouped = cut(get_length_grouped_indices(row_lengths, batch_size, generator=generator), batch_size)
    grouped.sort(key=lambda batch: max(row_lengths[i] for i in batch))
    at_random = cut(torch.randperm(len(lengths), generator=generator).tolist(), batch_size)
    everything = list(range(len(lengths)))
    aim = (_real(everything, lengths), padded_tokens(at_random, lengths), padded_tokens(grouped, lengths))

    def draw() -> tuple[float, Batches, Batches]:
        strata = [grouped[len(grouped) * k // steps : len(grouped) * (k + 1) // steps] for k in range(steps)]
        tight = [chance.choice(stratum) for stratum in strata]
        rows = [i for batch in tight for i in batch]
        chance.shuffle(tight)
        chance.shuffle(rows)
        loose = cut(rows, batch_size)
        found = (_real(rows, lengths), padded_tokens(loose, lengths), padded_tokens(tight, lengths))
        return sum(abs(a / b - 1) for a, b in zip(found, aim, strict=True)), loose, tight

    _, loose, tight = min((draw() for _ in range(DRAWS)), key=lambda drawn: drawn[0])
    first = sorted(everything, key=lambda i: lengths[i].row)[:batch_size]
    return Chosen(shuffled=[first, loose[0], *loose], grouped=[first, tight[0], *tight])


def write_rows(
    path: Path, pool: Sequence[Preference], chosen: Chosen, *, batch_size: int, seed: int
) -> dict[str, tuple[int, ...]]:
    """Write the chosen pairs such that our data module, which shuffles them, takes them in the chosen order.

    Returns:
        For each kind of order, rows of the file in the order in which they are trained on.
    """
    sequence = [i for batch in chosen.shuffled for i in batch]
    sampler = ShuffledBatches(len(sequence), batch_size, seed=seed, rank=0, world_size=1)
    places = [slot.index for batch in sampler for slot in batch]
    at_place = dict(zip(places, sequence, strict=True))
    path.write_text("".join(json.dumps(_as_row(pool[at_place[place]])) + "\n" for place in sorted(at_place)))
    place_of = {pool_row: place for place, pool_row in reversed(list(zip(places, sequence, strict=True)))}
    grouped = tuple(place_of[i] for batch in chosen.grouped for i in batch)
    return {"shuffled": tuple(places), "grouped": grouped}


def _as_row(preference: Preference) -> dict[str, object]:
    return {name: getattr(preference, name) for name in ("prompt", "chosen", "rejected")}


def _real(rows: Sequence[int], lengths: Sequence[Lengths]) -> float:
    return sum(lengths[i].real for i in rows) / len(rows)

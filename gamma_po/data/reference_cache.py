"""The reference's log-probabilities, scored once per pair and kept on disk under what they depend on.

That is the reference's weights, the pair's token ids after truncation, the layout, the precision and the attention
backend. Sums and token counts are kept, so one cache serves every loss, and a pair is found again in whatever data set,
order or subset it stands; β, margins, learning rates, label noise and batch sizes are no part of the key.

Two things that are no part of it change the last digits all the same: how far a pair's row was filled up, and which
pairs shared its forward, because that decides which kernels run. In float32 these are rounding errors; in bfloat16 they
reach some tenths of a nat per sequence, also in a sequence of one token, as they do between any two batch sizes of the
policy itself. Per token they average out: some thousandths of a nat in sequences of a hundred tokens. A cache is
filled with the batch size in force at the time and not again for another. An interrupted scoring continues at a
whole round of batches, so that with the same settings its numbers are those of one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.data.dataset import Example, Slot
from gamma_po.data.shards import ScoreTable, ShardFolder, pair_key
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.progress import track
from gamma_po.ranks import Ranks, as_one
from gamma_po.types import PairLogps, PreferenceBatch

log = logging.getLogger(__name__)

PAIRS_PER_SHARD = 1024  # what an interruption costs, at most
BASE_FIELDS = ("chosen", "rejected", "chosen_length", "rejected_length")
SHARED_FIELDS = ("chosen_shared", "rejected_shared")
Score = Callable[[PreferenceBatch], PairLogps]
Collate = Callable[[Sequence[Example]], PreferenceBatch]
Scored = tuple[list[int], PairLogps]  # places in the table, and their values


class ReferenceKey(NamedTuple):
    """All that the reference's numbers depend on, besides the tokens."""

    weights: str  # fingerprint
    layout: str
    precision: str
    attention: str


class CachedLogps(NamedTuple):
    """The reference's log-probabilities of a data set, and what they cost."""

    logps: PairLogps  # [N] each, on the CPU
    read: int  # pairs found on disk
    computed: int  # pairs scored now; equal pairs once
    size: int  # bytes of the reference's whole cache
    folder: Path

    def summary(self) -> str:
        """One line for the reader."""
        return f"{self.read:,} pairs read from the cache, {self.computed:,} scored"

    def place(self) -> str:
        """Where the cache is, and how large."""
        return f"{self.size / 2**20:.2f} MiB in {self.folder}"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/gamma_po/reference`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gamma_po" / "reference"


def folder_of(key: ReferenceKey, folder: Path) -> ShardFolder:
    """Return the shards of one reference inside the cache's folder."""
    digest = hashlib.sha256(json.dumps(key._asdict(), sort_keys=True).encode())
    return ShardFolder(folder / digest.hexdigest()[:32])


def cached_logps(
    pairs: Sequence[TokenizedPair],
    open_scorer: Callable[[], AbstractContextManager[Score]],
    *,
    key: ReferenceKey,
    folder: Path,
    ranks: Ranks,
    batch_size: int,
    collate: Collate,
    description: str,
    needed: Sequence[str] = BASE_FIELDS,
) -> CachedLogps:
    """Return the reference's log-probabilities of all pairs, from disk or by computing them once.

    Pairs are scored from the longest to the shortest, so that a lack of memory shows at once. Each shard of some
    thousand pairs is written when it is complete, and an interrupted scoring continues behind the last one.

    Args:
        pairs: N tokenised pairs, in clean order.
        open_scorer: opens the reference, in eval mode: a function from batch to [P] each; not called on a hit.
        key: what the numbers depend on.
        folder: where the cache lives; a folder per key.
        ranks: each scores its share; all get everything; only rank 0 reads and writes.
        batch_size: pairs per forward.
        collate: lays examples out for the model.
        description: what the progress bar says.
        needed: fields without which a stored pair is scored anew. Others are given where all pairs have them.

    Raises:
        ConfigError: the folder cannot be made or has no room.
    """
    keys = [pair_key(pair) for pair in pairs]
    row = {key: row for row, key in enumerate(keys)}  # of equal pairs, one
    table, store = ScoreTable(list(row)), folder_of(key, folder)
    _read(store, table, ranks)
    work = missing = table.missing(needed)
    if missing:
        with as_one(ranks):
            if ranks.rank == 0:
                store.check_room(len(missing))
        name = hashlib.sha256(b"".join(sorted(row))).hexdigest()[:16]
        with store.claimed(name, leader=ranks.rank == 0, told=lambda said: _told(ranks, said)):
            _read(store, table, ranks)  # another run may have been here while this one waited
            work = table.missing(needed)
            if work:
                scoring = _Scoring(ranks, batch_size, collate, description)
                with open_scorer() as score:
                    _compute(scoring, score, [pairs[i] for i in row.values()], work, table, store)
    places = torch.tensor([table.place[key] for key in keys])
    size = store.size() if ranks.rank == 0 else 0
    found = CachedLogps(table.logps(places), len(row) - len(work), len(work), size, store.path)
    log.info("%s: %s; %s", description, found.summary(), found.place())
    return found


class _Scoring(NamedTuple):
    """How pairs are scored."""

    ranks: Ranks
    batch_size: int
    collate: Collate
    description: str


def _compute(
    scoring: _Scoring,
    score: Score,
    pairs: Sequence[TokenizedPair],
    missing: Sequence[int],
    table: ScoreTable,
    store: ShardFolder,
) -> None:
    """Score the missing pairs shard by shard; each rank takes every world_size-th batch, all run equally many."""
    ranks, size = scoring.ranks, scoring.batch_size
    order = sorted(missing, key=lambda place: -sum(len(part) for part in pairs[place][:3]))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rounds = -(-len(batches) // ranks.world_size)
    mine = [batches[min(i * ranks.world_size + ranks.rank, len(batches) - 1)] for i in range(rounds)]
    per_shard = max(1, PAIRS_PER_SHARD // (size * ranks.world_size))
    keys = list(table.place)
    scored: list[Scored] = []
    for number, batch in enumerate(track(mine, scoring.description, visible=ranks.rank == 0), start=1):
        prepared = scoring.collate([_example(place, pairs[place]) for place in batch])
        scored.append((prepared.index.tolist(), score(prepared)))
        if number % per_shard == 0 or number == rounds:
            places, names, values = _gathered(scored, ranks)
            table.put(places, names, values)
            if ranks.rank == 0:
                store.write([keys[place] for place in places.tolist()], names, values)
            scored = []


def _example(place: int, pair: TokenizedPair) -> Example:
    return Example(Slot(place), pair.prompt, pair.chosen, pair.rejected, False, float("nan"), None)


def _gathered(scored: Sequence[Scored], ranks: Ranks) -> tuple[Tensor, list[str], Tensor]:
    """Places, names of the fields, and values [n, fields] of all ranks' pairs, each pair once."""
    names = [name for name, field in scored[0][1]._asdict().items() if field is not None]
    values = torch.cat([torch.stack([getattr(logps, name).float() for name in names], dim=1) for _, logps in scored])
    places = torch.tensor([place for batch, _ in scored for place in batch], device=values.device)
    places, values = ranks.all_gather(places).cpu(), ranks.all_gather(values).cpu()
    once = {place: i for i, place in enumerate(places.tolist())}  # the last batch fills up the last round
    return torch.tensor(list(once)), names, values[list(once.values())]


def _read(store: ShardFolder, table: ScoreTable, ranks: Ranks) -> None:
    """Rank 0 reads the disk; the others are told, so that they need not see the same one."""
    if ranks.rank == 0:
        store.read_into(table)
    if ranks.world_size > 1:
        own = slice(None) if ranks.rank == 0 else slice(0)
        table.values, table.known = ranks.all_gather(table.values[own]), ranks.all_gather(table.known[own])


def _told(ranks: Ranks, said: bool) -> bool:
    """What rank 0 says, on every rank."""
    return bool(ranks.all_gather(torch.tensor([said] if ranks.rank == 0 else [], dtype=torch.bool))[0])

"""The reference's log-probabilities, computed once and kept on disk under the hash of what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gamma_po.data.dataset import Example, Slot, by_length
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError
from gamma_po.files import write_bytes
from gamma_po.progress import track
from gamma_po.ranks import Ranks
from gamma_po.types import PairLogps, PreferenceBatch

log = logging.getLogger(__name__)

SPARE_BYTES = 16 * 2**20
Score = Callable[[PreferenceBatch], PairLogps]
Collate = Callable[[Sequence[Example]], PreferenceBatch]


class ReferenceKey(NamedTuple):
    """All that the reference's numbers depend on, besides the tokens."""

    weights: str  # fingerprint
    layout: str
    precision: str
    attention: str


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/gamma_po/reference`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gamma_po" / "reference"


def cache_file(folder: Path, key: ReferenceKey, pairs: Sequence[TokenizedPair]) -> Path:
    """Return the file that holds these pairs' log-probabilities under this reference."""
    digest = hashlib.sha256(json.dumps(key._asdict(), sort_keys=True).encode())
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.to(torch.int32).numpy().tobytes())
    return folder / f"{digest.hexdigest()}.safetensors"


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
) -> PairLogps:
    """Return the reference's log-probabilities of all pairs, from disk or by computing them once.

    Args:
        pairs: N tokenised pairs, in clean order.
        open_scorer: opens the reference, in eval mode: a function from batch to [P] each; not called on a hit.
        key: what the numbers depend on.
        folder: where the cache lives; one file per data set and key.
        ranks: each scores its share; all get everything; rank 0 writes.
        batch_size: pairs per forward.
        collate: lays examples out for the model.
        description: what the progress bar says.

    Returns:
        [N] each, on the CPU.

    Raises:
        ConfigError: the folder cannot be made or has no room.
    """
    path = cache_file(folder, key, pairs)
    found = _read(path, len(pairs))
    if bool(ranks.all_gather(torch.tensor([found is not None])).all()) and found is not None:
        log.info("reference log-probabilities: %s pairs read from %s", len(pairs), path)
        return found
    if ranks.rank == 0:
        check_room(folder, 16 * len(pairs))
    with open_scorer() as score:
        logps = _compute(pairs, score, ranks, batch_size, collate, description)
    if ranks.rank == 0:
        _write(path, logps)
    return logps


def check_room(folder: Path, needed: int) -> None:
    """Make the folder and fail early where it cannot take `needed` bytes.

    Raises:
        ConfigError: naming the folder, what is free and what to set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {folder} cannot be used: {error}; set data.cache_dir to another folder"
        ) from error
    if free < needed + SPARE_BYTES:
        raise ConfigError(
            f"data.cache_dir: {folder} has {free / 2**20:.0f} MiB free, the reference cache needs "
            f"{(needed + SPARE_BYTES) / 2**20:.0f} MiB; free some space or set data.cache_dir to another folder"
        )


def _compute(
    pairs: Sequence[TokenizedPair],
    score: Score,
    ranks: Ranks,
    batch_size: int,
    collate: Collate,
    description: str,
) -> PairLogps:
    """Score pairs sorted by length, each rank every world_size-th batch; every rank runs equally many forwards."""
    order = by_length(pairs)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // ranks.world_size)
    mine = [batches[min(i * ranks.world_size + ranks.rank, len(batches) - 1)] for i in range(rounds)]
    rows, values = [], []
    for batch in track(mine, description, visible=ranks.rank == 0):
        examples = [_example(i, pairs[i]) for i in batch]
        logps = score(collate(examples))
        rows.append(torch.tensor(batch))
        values.append(torch.stack([field.float() for field in logps], dim=1))
    device = values[0].device
    all_rows = ranks.all_gather(torch.cat(rows).to(device)).cpu()
    all_values = ranks.all_gather(torch.cat(values)).cpu()
    table = torch.empty(len(pairs), 4, dtype=torch.float32)
    table[all_rows] = all_values
    return PairLogps(*table.unbind(1))


def _example(index: int, pair: TokenizedPair) -> Example:
    return Example(Slot(index), pair.prompt, pair.chosen, pair.rejected, False, float("nan"), None)


def _read(path: Path, num_pairs: int) -> PairLogps | None:
    """Read a cache file; one that is not whole counts as absent and is computed anew."""
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        logps = PairLogps(*(tensors[name] for name in PairLogps._fields))
    except (SafetensorError, KeyError) as error:
        log.warning("the reference cache %s is damaged (%s) and is computed anew", path, error)
        return None
    return logps if len(logps.chosen) == num_pairs else None


def _write(path: Path, logps: PairLogps) -> None:
    """Write beside the target and rename; if the disk refuses, keep the numbers in memory and say so."""
    content = save({name: value.contiguous().clone() for name, value in logps._asdict().items()})
    try:
        write_bytes(path, content)
    except OSError as error:
        log.warning(
            "the reference log-probabilities could not be saved to %s (%s); they are used from memory",
            path,
            error,
        )

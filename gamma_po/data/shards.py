"""Log-probabilities on disk: whole files of scored pairs, found again by the pairs' tokens."""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError
from gamma_po.files import ABANDONED, acquired, write_bytes
from gamma_po.types import PairLogps

log = logging.getLogger(__name__)

FIELDS = PairLogps._fields
KEY_BYTES = 16
BYTES_PER_PAIR = KEY_BYTES + 4 * len(FIELDS)
SPARE_BYTES = 16 * 2**20
SECONDS_BETWEEN_LOOKS = 1.0


def pair_key(pair: TokenizedPair) -> bytes:
    """Return a hash of a pair's token ids and of nothing else."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(ids.to(torch.int32).numpy().tobytes())
    return digest.digest()


class ScoreTable:
    """What is known of U different pairs: a value per field, where there is one.

    Args:
        keys: of the pairs, all different.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.place = {key: place for place, key in enumerate(keys)}
        self.values = torch.zeros(len(keys), len(FIELDS))
        self.known = torch.zeros(len(keys), len(FIELDS), dtype=torch.bool)

    def put(self, places: Tensor, names: Sequence[str], values: Tensor) -> None:
        """Enter values [n, fields] of the pairs at `places`."""
        columns = torch.tensor([FIELDS.index(name) for name in names])
        self.values[places[:, None], columns] = values
        self.known[places[:, None], columns] = True

    def missing(self, needed: Sequence[str]) -> list[int]:
        """Return the places of the pairs that lack a needed field."""
        columns = [FIELDS.index(name) for name in needed]
        return (~self.known[:, columns].all(dim=1)).nonzero().flatten().tolist()

    def logps(self, places: Tensor) -> PairLogps:
        """Return the fields that are known of every pair, for the pairs at `places`, in their order."""
        complete = self.known.all(dim=0).tolist()
        columns = self.values[places].unbind(dim=1)
        return PairLogps(*(column if there else None for column, there in zip(columns, complete, strict=True)))


class ShardFolder:
    """The folder of one reference: shards of pairs, each written whole under a name of its own and never changed.

    Any number of processes may read and write at once: none touches a file of another, and a pair that two of them
    scored is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writable = True

    def files(self) -> list[Path]:
        """The shards there are."""
        return sorted(self.path.glob("*.safetensors"))

    def size(self) -> int:
        """Bytes on disk."""
        total = 0
        for file in self.files():
            with suppress(FileNotFoundError):  # another process found it damaged in between
                total += file.stat().st_size
        return total

    def read_into(self, table: ScoreTable) -> None:
        """Enter all that the shards know of the table's pairs."""
        for file in self.files():
            shard = _read(file)
            if shard is None:
                continue
            keys, names, values = shard
            found = [(i, table.place[key]) for i, key in enumerate(keys) if key in table.place]
            if found:
                rows, places = torch.tensor(found).unbind(dim=1)
                table.put(places, names, values[rows])

    def write(self, keys: Sequence[bytes], names: Sequence[str], values: Tensor) -> None:
        """Write a shard; if the disk refuses, say so once and keep the numbers in memory only."""
        if not self._writable:
            return
        pairs = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
        columns = {name: column.contiguous() for name, column in zip(names, values.unbind(dim=1), strict=True)}
        try:
            write_bytes(self.path / f"{secrets.token_hex(8)}.safetensors", save({"pairs": pairs, **columns}))
        except OSError as error:
            self._writable = False
            log.warning(
                "the reference log-probabilities could not be saved to %s (%s); they are used from memory",
                self.path,
                error,
            )

    def tidy(self) -> None:
        """Remove what was being written when a process was killed, and has long not been."""
        for left in self.path.glob(".*.partial"):
            with suppress(OSError):  # of others, or removed by another process meanwhile
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()

    def check_room(self, num_pairs: int) -> None:
        """Make the folder, tidy it, and fail early where it cannot take so many pairs.

        Raises:
            ConfigError: naming the folder, what is free and what to set.
        """
        parent, needed = self.path.parent, BYTES_PER_PAIR * num_pairs + SPARE_BYTES
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.tidy()
            free = shutil.disk_usage(parent).free
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir: {parent} cannot be used: {error}; set data.cache_dir to another folder"
            ) from error
        if free < needed:
            raise ConfigError(
                f"data.cache_dir: {parent} has {free / 2**20:.0f} MiB free, the reference cache needs "
                f"{needed / 2**20:.0f} MiB; free some space or set data.cache_dir to another folder"
            )

    @contextmanager
    def claimed(self, work: str, *, leader: bool, told: Callable[[bool], bool]) -> Iterator[None]:
        """Wait until no other process does this work, then keep others waiting until it is done.

        The operating system takes the claim back from a process that ends, however it ends.

        Args:
            work: names it.
            leader: this is the one process of the run that claims.
            told: gives every process of the run what the leader says.
        """
        lock = FileLock(self.path / f"{work}.lock")
        patient = False
        while not told(leader and acquired(lock, blocking=False)):
            if leader and not patient:
                log.warning(
                    "another run is scoring the same pairs under the same reference (%s is locked); waiting for it",
                    lock.lock_file,
                )
            patient = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            yield
        finally:
            lock.release()


def _read(file: Path) -> tuple[list[bytes], list[str], Tensor] | None:
    """Read a shard: keys, names of the fields, [n, fields]; a damaged one is removed and its pairs missed."""
    try:
        tensors = load_file(file)
        raw = tensors.pop("pairs").numpy().tobytes()
        names = [name for name in FIELDS if name in tensors]
        values = torch.stack([tensors[name].float() for name in names], dim=1)
        keys = [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} pairs, {len(values)} values")
    except FileNotFoundError:
        return None
    except OSError as error:  # no right to read it, too many files open: the shard may be whole, so it stays
        log.warning("the reference cache %s cannot be read (%s): its pairs are computed anew", file, error)
        return None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        log.warning("the reference cache %s is damaged (%s) and is computed anew", file, error)
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    return keys, names, values

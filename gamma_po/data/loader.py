"""Batches whose order is a function of (seed, epoch, rank, world size), and a loader that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from gamma_po.data.dataset import PairDataset, Slot
from gamma_po.errors import ConfigError, DataError


class ShuffledBatches(Sampler[list[Slot]]):
    """Training batches of one rank: shuffled anew each epoch, incomplete global batches left out.

    Args:
        num_pairs: N in the dataset.
        batch_size: pairs per rank and batch.
        seed: of the order.
        rank, world_size: which part of each global batch this process gets.
    """

    def __init__(self, num_pairs: int, batch_size: int, *, seed: int, rank: int, world_size: int) -> None:
        self.num_pairs, self.batch_size, self.seed = num_pairs, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.skip = 0
        if len(self) == 0:
            raise DataError(
                f"the training split has {num_pairs} pairs, fewer than one global batch of {batch_size} × {world_size} "
                "ranks; lower data.batch_size or give more pairs"
            )

    def __len__(self) -> int:
        return self.num_pairs // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Slot]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator).tolist()
        step = self.batch_size * self.world_size
        for batch in range(self.skip, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [Slot(index) for index in order[start : start + self.batch_size]]


class SequentialBatches(Sampler[list[Slot]]):
    """Evaluation batches of one rank: every pair once; ranks get equally many batches, filled with weight 0.

    Args:
        order: the rows, in the order in which they are taken; sorted by length, little is padded.
        batch_size: pairs per rank and batch.
        rank, world_size: this process takes every world_size-th row.
    """

    def __init__(self, order: Sequence[int], batch_size: int, *, rank: int, world_size: int) -> None:
        self.order, self.batch_size, self.rank, self.world_size = order, batch_size, rank, world_size

    def __len__(self) -> int:
        per_rank = -(-len(self.order) // self.world_size)
        return -(-per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        per_rank = -(-len(self.order) // self.world_size)
        mine = [Slot(index) for index in self.order[self.rank :: self.world_size]]
        mine += [Slot(self.order[0], weight=0.0)] * (per_rank - len(mine))
        for start in range(0, per_rank, self.batch_size):
            yield mine[start : start + self.batch_size]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over ShuffledBatches that knows how many batches of which epoch it has given out."""

    batch_sampler: ShuffledBatches

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._yielded = 0
        self._resume: dict[str, Any] | None = None
        self._digest = self.dataset.digest() if isinstance(self.dataset, PairDataset) else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it counts in; Lightning saves it in checkpoints."""
        return {"epoch": self.batch_sampler.epoch, "yielded": self._yielded, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position at the next iteration.

        Raises:
            ConfigError: the position is inside an epoch, whose order here would be another.
        """
        inside_epoch = 0 < state["yielded"] < len(self.batch_sampler)
        for name, value in self._order().items():
            if inside_epoch and state[name] != value:
                raise ConfigError(
                    f"the checkpoint stopped inside an epoch with {name}={state[name]}, this run has {name}={value}: "
                    "it would not continue with the same pairs; use the settings of the run that wrote the checkpoint"
                )
        self._resume = dict(state)

    def _order(self) -> dict[str, Any]:
        sampler = self.batch_sampler
        order = {name: getattr(sampler, name) for name in ("num_pairs", "batch_size", "world_size", "seed")}
        return {**order, "data": self._digest}

    def __iter__(self) -> Iterator[Any]:
        # Set at the start, not the end: the trainer stops asking after the last batch and never exhausts this.
        self.batch_sampler.skip = self._yielded = self._take_resume()
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def _take_resume(self) -> int:
        """How many batches of the coming epoch were given out before the checkpoint."""
        resume, self._resume = self._resume, None
        if resume is None or resume["epoch"] != self.batch_sampler.epoch:
            return 0
        return resume["yielded"] if resume["yielded"] < len(self.batch_sampler) else 0

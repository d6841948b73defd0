"""Batches whose order is a function of (seed, epoch, rank, world size), and a loader that resumes exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Sampler

from gamma_po.data.batching import TokenCosts
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
        """Choose the epoch whose order comes next; PreferenceModule calls this at the start of each."""
        self.epoch = epoch

    def settings(self) -> dict[str, Any]:
        """What the order is a function of; a checkpoint inside an epoch is only good for the same."""
        return {name: getattr(self, name) for name in ("num_pairs", "batch_size", "world_size", "seed")}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def _order(self, generator: torch.Generator) -> list[int]:
        """The epoch's pairs in the order in which global batches take them, without those that fill none."""
        pairs = len(self) * self.batch_size * self.world_size
        return torch.randperm(self.num_pairs, generator=generator).tolist()[:pairs]

    def __iter__(self) -> Iterator[list[Slot]]:
        order = self._order(self._generator())
        step = self.batch_size * self.world_size
        for batch in range(self.skip, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [Slot(index) for index in order[start : start + self.batch_size]]


class TokenBatches(ShuffledBatches):
    """Training batches of one rank whose pairs are chosen by tokens; the optimizer steps stay what they are.

    What training sees as one sample is the optimizer step: `batch_size × accumulate × world_size` pairs, always, so
    that learning rate and schedule keep their meaning. Tokens decide only how a step's pairs fall into its
    `accumulate × world_size` micro-batches: pairs of like length meet where rows are filled up, and the largest
    micro-batch is as small as it can be, so that no memory is reserved for the unlucky one and no rank waits for
    another. Micro-batches then have different numbers of pairs; each pair's weight is P / batch_size, so that the
    mean of `weight × loss` over a micro-batch, averaged over micro-batches and ranks, is the mean over the step's
    pairs, however they were cut. (Steps filled up to a number of tokens would weigh a pair by the lengths of
    whatever it meets, and would change with every setting that changes tokens.)

    With a window of 1 the steps hold the very pairs that ShuffledBatches gives them. A larger one sorts the pairs
    of that many steps by length before it cuts them into steps, and shuffles the steps: less is filled up also
    with one micro-batch per step, but a step's pairs are then alike in length. An epoch's last step, if smaller,
    stays a random sample and stays last.

    Args:
        costs: tokens of the dataset's pairs.
        batch_size: pairs per micro-batch and rank, on average.
        accumulate: micro-batches per step and rank.
        window: steps sorted together, >= 1.
        seed, rank, world_size: as for ShuffledBatches.
    """

    def __init__(
        self, costs: TokenCosts, batch_size: int, *, accumulate: int, window: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__(len(costs.widths), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.costs, self.accumulate, self.window = costs, accumulate, window

    def settings(self) -> dict[str, Any]:
        """What the order is a function of."""
        padded = {"padded": self.costs.padded}
        return {**super().settings(), "accumulate": self.accumulate, "length_window": self.window, **padded}

    def __iter__(self) -> Iterator[list[Slot]]:
        first, given = divmod(self.skip, self.accumulate)
        for number, step in list(enumerate(self._steps()))[first:]:
            for micro_batch in self._micro_batches(step, number)[given:]:
                weight = len(micro_batch) / self.batch_size
                yield [Slot(row, weight) for row in micro_batch]
            given = 0

    def _steps(self) -> list[list[int]]:
        """The epoch's optimizer steps, all ranks' pairs of each."""
        generator = self._generator()
        order = self._order(generator)
        size = self.batch_size * self.world_size * self.accumulate
        whole = len(order) - len(order) % size
        rest = [order[whole:]] if whole < len(order) else []
        steps = []
        for start in range(0, whole, self.window * size):
            together = order[start : min(start + self.window * size, whole)]
            if self.window > 1:
                together.sort(key=lambda row: self.costs.widths[row])
            steps += [together[i : i + size] for i in range(0, len(together), size)]
        if self.window > 1:
            steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        return steps + rest

    def _micro_batches(self, step: list[int], number: int) -> list[list[int]]:
        """This rank's micro-batches of a step, in an order that has nothing to do with length."""
        parts = self.costs.balanced(step, len(step) // self.batch_size)
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, number)) % 2**63)
        order = torch.randperm(len(parts), generator=generator).tolist()
        return [parts[i] for i in order[self.rank :: self.world_size]]


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


def loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    """Return what every DataLoader of a run is given, besides its data.

    Args:
        num_workers: processes that collate batches.
        seed: of the loader's own random numbers, which decide nothing here but must not come from elsewhere.
    """
    return {
        "num_workers": num_workers,
        "generator": torch.Generator().manual_seed(seed),
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": leave_signals_to_the_parent if num_workers else None,
    }


def leave_signals_to_the_parent(worker: int) -> None:
    """Let a process that collates batches live on when its whole process group is told to stop.

    The training process takes SIGINT, SIGUSR1 and SIGTERM and finishes its step, for which it needs the next batches.
    SIGTERM from the training process itself still ends the worker: that is how torch takes it down.

    Args:
        worker: number of the process, for `DataLoader(worker_init_fn=...)`.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over ShuffledBatches that knows how many batches of which epoch it has given out.

    Args:
        resume: what a position in another order means. exact: an error; anyway: the position behind as many pairs.
        accumulate: batches per optimizer step; a position in another order is moved back to the start of a step.
    """

    batch_sampler: ShuffledBatches

    def __init__(
        self, *args: Any, resume: Literal["exact", "anyway"] = "exact", accumulate: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.resume, self.accumulate = resume, accumulate
        self.moved_to: int | None = None  # batches, where the position was in another order
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
        inside_epoch = 0 < state["yielded"] < state["num_pairs"] // (state["batch_size"] * state["world_size"])
        saved = {name: value for name, value in state.items() if name not in ("epoch", "yielded")}
        here = self._order()
        different = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
        if inside_epoch and different and self.resume == "anyway":
            pairs = state["yielded"] * state["batch_size"] * state["world_size"]
            place = pairs // (self.batch_sampler.batch_size * self.batch_sampler.world_size)
            self.moved_to = min(place, len(self.batch_sampler) - 1) // self.accumulate * self.accumulate
            state = {**state, "yielded": self.moved_to}
        elif inside_epoch and different:
            before, now = (
                ", ".join(f"{name}={settings.get(name, 'not set')}" for name in different) for settings in (saved, here)
            )
            raise ConfigError(
                f"the checkpoint stopped inside an epoch with {before}, this run has {now}: "
                "it would not continue with the same pairs; use the settings of the run that wrote the checkpoint"
            )
        self._resume = dict(state)

    def _order(self) -> dict[str, Any]:
        return {**self.batch_sampler.settings(), "data": self._digest}

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

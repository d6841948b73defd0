"""What the mathematics may know of other processes: how many there are, and their values side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, DataError

SHARED_ERRORS = (ConfigError, DataError, FloatingPointError, OSError)  # what a rank may find wrong with its own part
SEPARATOR = "\x00"  # between the ranks' messages


class Gathered(NamedTuple):
    """The values of all ranks, and where this rank's own begin."""

    values: Tensor  # [n_0 + n_1 + ..., ...], the same on every rank
    start: int


class Ranks(ABC):
    """The processes of one run."""

    rank: int
    world_size: int

    @abstractmethod
    def gather(self, values: Tensor) -> Gathered:
        """Concatenate the ranks' values along the first dimension, in rank order.

        Args:
            values: [n_r, ...], read without its graph; n_r may differ between ranks.
        """

    def all_gather(self, values: Tensor) -> Tensor:
        """Return `gather(values).values`."""
        return self.gather(values).values

    def mean(self, values: Tensor) -> Tensor:
        """Average values of one shape over the ranks."""
        return self.all_gather(values[None]).mean(0)


class Local(Ranks):
    """One process alone.

    >>> Local().all_gather(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    rank = 0
    world_size = 1

    def gather(self, values: Tensor) -> Gathered:
        """Return the values themselves."""
        return Gathered(values.detach(), 0)


class Distributed(Ranks):
    """The processes of an initialised `torch.distributed` group."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def gather(self, values: Tensor) -> Gathered:
        """Gather counts first, then rows padded to the longest rank."""
        home, values = values.device, self._reachable(values.detach()).contiguous()
        counts = [int(n) for n in self._gather_equal(torch.tensor([values.shape[0]], device=values.device))]
        if not any(counts):
            return Gathered(values.to(home), 0)
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: values.shape[0]] = values
        pieces = [rows[:count] for rows, count in zip(self._gather_equal(padded), counts, strict=True)]
        return Gathered(torch.cat(pieces).to(home), sum(counts[: self.rank]))

    def mean(self, values: Tensor) -> Tensor:
        """Average in one reduction, without waiting for the device."""
        total = self._reachable(values.detach().clone())
        torch.distributed.all_reduce(total)
        return (total / self.world_size).to(values.device)

    def _gather_equal(self, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, values)
        return gathered

    def _reachable(self, values: Tensor) -> Tensor:
        """Move values to where the group can send them from: NCCL knows only the GPU."""
        return values.cuda() if torch.distributed.get_backend() == "nccl" else values


def current_ranks() -> Ranks:
    """Return the ranks of the initialised process group, or `Local()` where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Distributed()
    return Local()


def lines_of_all(ranks: Ranks, line: str) -> list[str]:
    """Return the lines of the processes that say one, in rank order; every rank must come here.

    Args:
        ranks: the processes of the run.
        line: of this one; empty if it says none.

    >>> lines_of_all(Local(), "here")
    ['here']
    """
    said = f"{line.replace(SEPARATOR, ' ')}{SEPARATOR}" if line else ""
    everything = ranks.all_gather(torch.tensor(list(said.encode()), dtype=torch.uint8))
    return bytes(everything.tolist()).decode().split(SEPARATOR)[:-1]


@contextmanager
def as_one(ranks: Ranks) -> Iterator[None]:
    """Raise on every rank what one of them raises inside, so that none waits forever for a rank that has stopped.

    Every rank must come here, and the block must not talk to the other ranks. The message is the same everywhere: that
    of the rank, or those of the ranks, that found something wrong.

    Args:
        ranks: the processes of the run.

    Raises:
        ConfigError, DataError, FloatingPointError, OSError: as raised inside, on this rank or on another.
    """
    own: Exception | None = None
    try:
        yield
    except SHARED_ERRORS as error:
        if ranks.world_size == 1:
            raise
        own = error
    if ranks.world_size == 1:
        return
    line = ""
    if own is not None:
        kind = next(number for number, one in enumerate(SHARED_ERRORS) if isinstance(own, one))
        line = f"{kind} {getattr(own, 'errno', None) or 0} {own}"
    found = [line.split(" ", 2) for line in dict.fromkeys(lines_of_all(ranks, line))]
    if found:
        first, number, _ = found[0]
        shared = SHARED_ERRORS[int(first)]("; and on another process: ".join(message for _, _, message in found))
        if isinstance(shared, OSError):
            shared.errno = int(number)
        raise shared from own

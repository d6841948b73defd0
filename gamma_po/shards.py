"""Read the weights of a sharded checkpoint, which several processes wrote into a folder, in one process."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Size, Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gamma_po.errors import ConfigError

BESIDE_SHARDS = "meta.pt"  # Lightning's file for all but weights and optimizer
INDEX = ".metadata"  # torch's: what lies where in the shards, as a pickle, written when all of them are
WEIGHTS = ("state_dict", "model")  # what ModelParallelStrategy and FSDPStrategy put before the names of weights
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, AssertionError, KeyError, IndexError, AttributeError, ImportError),
    pickle.UnpicklingError,
)


def is_sharded(path: Path) -> bool:
    """Tell whether a checkpoint is a folder of shards."""
    return (path / BESIDE_SHARDS).is_file()


def check_shards(path: Path, *, weights_only: bool) -> None:
    """Refuse what cannot be read as a sharded checkpoint, or not this safely.

    Args:
        path: a folder.
        weights_only: nothing may be unpickled; torch unpickles parts of every sharded checkpoint.

    Raises:
        ConfigError: the folder is no sharded checkpoint, was not written to its end, or nobody vouches for it.
    """
    if not is_sharded(path):
        raise ConfigError(f"{path} is a folder, but no sharded checkpoint: it holds no {BESIDE_SHARDS}")
    if not (path / INDEX).is_file():
        raise ConfigError(f"{path}: half a sharded checkpoint: it holds no {INDEX}; allowed: a whole one")
    if weights_only:
        raise ConfigError(
            f"{path} is a sharded checkpoint, and loading one can run code hidden in it. If you wrote it, set "
            "`weights_only` beside the path (e.g. --policy.weights_only false)"
        )


def shapes_in_shards(folder: Path) -> dict[str, Size]:
    """Return the weights' names, as in a checkpoint of one file, and their whole shapes. This unpickles the index.

    Raises:
        ConfigError: the index is damaged.
    """
    return {name.partition(".")[2]: entry.size for name, entry in _weights(folder).items()}


def read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    """Bring weights together in tensors that are there, and so without a second copy; the optimizer's are not read.

    Args:
        folder: whose author is trusted.
        into: by name, of the weights' whole shapes, in any dtype, on the CPU; they are changed.

    Raises:
        ConfigError: a shard is missing, cut short or damaged.
    """
    places = {name: into[inner] for name in _weights(folder) if (inner := name.partition(".")[2]) in into}
    with _whole_or_refused(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is wanted
        load(places, storage_reader=FileSystemReader(folder), no_dist=True)


def _weights(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The index of the weights, by their names in the shards."""
    with _whole_or_refused(folder):
        index = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: entry for name, entry in tensors.items() if name.partition(".")[0] in WEIGHTS}


@contextmanager
def _whole_or_refused(folder: Path) -> Iterator[None]:
    """Say which checkpoint it is that cannot be read; torch wraps its errors, and also an interruption."""
    try:
        yield
    except (CheckpointException, *UNREADABLE) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, UNREADABLE):
            raise cause from None
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: half a sharded checkpoint, or a damaged one: {reason}") from error

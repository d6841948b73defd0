"""What must be whole after a kill, and what must be equal at the end."""

from __future__ import annotations

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gamma_po.errors import ConfigError
from gamma_po.runs import PREVIOUS, furthest_checkpoint, read_checkpoint, read_plain
from gamma_po.shards import BESIDE_SHARDS

UNREADABLE = (CheckpointException, OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError)
TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "margin_state", "loss_state", "global_step")


class Broken(Exception):
    """An interruption has left something that is neither whole nor absent, or has changed the training."""


def runs_of(folder: Path) -> list[Path]:
    """The run directories of a series, in the order of their start."""
    found = folder.glob("runs/run/*")
    return sorted(found, key=lambda run: (run.name[:15], len(run.name), run.name))


def furthest_step(folder: Path) -> int:
    """Optimizer steps in the furthest checkpoint; 0 where there is none."""
    found = [furthest_checkpoint(run) for run in runs_of(folder)]
    return max((one.step for one in found if one is not None), default=0)


def check_whole(folder: Path) -> None:
    """Read every checkpoint, shard of the cache and recorded step.

    Raises:
        Broken: one is there under its name, but not whole.
    """
    try:
        for file in _checkpoints(folder):
            read_trained(file)
        for file in folder.glob("cache/gamma_po/reference/*/*.safetensors"):
            load_file(file)
        for file in folder.glob("runs/run/*/pairs/*.parquet"):
            pq.read_table(file)
    except (ConfigError, SafetensorError, pa.ArrowException) as error:
        raise Broken(str(error)) from error


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under their names, and shards whose successor has not taken their name yet."""
    found = list(folder.glob("runs/run/*/checkpoints/*.ckpt"))
    waiting = folder.glob(f"runs/run/*/checkpoints/*.ckpt{PREVIOUS}")
    return found + [file for file in waiting if not file.with_name(file.name.removesuffix(PREVIOUS)).exists()]


def read_trained(path: Path) -> dict[str, Any]:
    """Return what training changes of a checkpoint, in one file or in shards.

    Shards are brought together by torch, which unpickles: only for checkpoints that this program has just written.

    Raises:
        Broken: a part of its shards is missing or cut short.
        ConfigError: the same of a file.
    """
    if path.is_file():
        return {name: value for name, value in read_checkpoint(path).items() if name in TRAINED}
    with TemporaryDirectory() as place:
        whole = Path(place) / "whole.pt"
        try:
            dcp_to_torch_save(path, whole)
        except UNREADABLE as error:
            reason = str(error).strip() or type(error).__name__
            raise Broken(f"{path}: half a checkpoint in shards: {reason}") from error
        beside = read_plain(path / BESIDE_SHARDS, needed=("global_step", "margin_state", "trained_weights"))
        return torch.load(whole, weights_only=True) | {name: beside[name] for name in TRAINED if name in beside}


def same_steps(run: Path, whole: Path, *, first: int) -> bool:
    """Compare the steps that an attempt came to with those of the uninterrupted training.

    Args:
        run: of the attempt.
        whole: of the uninterrupted training.
        first: the step it should have begun with.

    Returns:
        Whether there was a step to compare.

    Raises:
        Broken: another pair, loss or γ, or another first step.
    """
    files = sorted((run / "pairs").glob("*.parquet"))
    for file in files:
        if not pq.read_table(file).equals(pq.read_table(whole / "pairs" / file.name)):
            raise Broken(f"{file}: other pairs, losses or margins than in the uninterrupted training")
    if files and int(files[0].name.split("-")[1].split(".")[0]) != first:
        raise Broken(f"{run}: began with {files[0].name}, the last checkpoint was from the step before {first}")
    return bool(files)


def same_ending(run: Path, whole: Path) -> None:
    """Compare the last checkpoints and the exported policies.

    Raises:
        Broken: a bit differs.
    """
    ours, theirs = (folder / "checkpoints" / "last.ckpt" for folder in (run, whole))
    if ours.exists():
        _same(read_trained(ours), read_trained(theirs), theirs.name)
    exported = sorted((whole / "policy").glob("*.safetensors"))
    if not exported:
        raise Broken(f"{whole}: no exported policy to compare with")
    for file in exported:
        _same(load_file(run / "policy" / file.name), load_file(file), file.name)


def _same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        equal = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        equal = ours.keys() == theirs.keys()
        for key in theirs if equal else ():
            _same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        equal = len(ours) == len(theirs)
        for i, pair in enumerate(zip(ours, theirs, strict=True) if equal else ()):
            _same(*pair, f"{where}[{i}]")
    else:
        equal = ours == theirs
    if not equal:
        raise Broken(f"{where} differs from that of the uninterrupted training")

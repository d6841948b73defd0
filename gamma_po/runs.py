"""Run directories and their checkpoints: found, and read as plain tensors and values; nothing in them is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from gamma_po.errors import ConfigError
from gamma_po.shards import BESIDE_SHARDS, is_sharded

LAST = "last.ckpt"
CHECKPOINTS = (LAST, "interrupted.ckpt")
FORMAT_KEY, FORMAT = "gamma_po_format", 1  # raised when a checkpoint's parts come to mean something else
PREVIOUS = ".previous"  # a folder of shards while the next one takes its name
RECORDS = ("config.yaml", "run.json")  # what marks a run directory


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory; one that others keep to themselves is none."""
    try:
        return all((folder / name).is_file() for name in RECORDS)
    except OSError:
        return False


def run_of(path: Path) -> Path | None:
    """Return the run directory in which a checkpoint or an exported folder lies, if it lies in one."""
    return next(filter(is_run, path.resolve().parents[:2]), None)


def runs_in(folder: Path) -> list[Path]:
    """Return the runs of a folder of runs, which are named after their start, in the order of these."""
    return sorted(filter(is_run, folder.iterdir()), key=lambda run: (run.name[:15], len(run.name), run.name))


def latest_run(folder: Path) -> Path | None:
    """Return the last run of a folder of runs; None where it holds no run."""
    return next(reversed(runs_in(folder)), None)


def run_config(run: Path) -> dict[str, Any]:
    """Return a run's `config.yaml` as plain values.

    Raises:
        ConfigError: it is not valid.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / 'config.yaml'}: cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


class Found(NamedTuple):
    """A checkpoint of a run."""

    path: Path
    step: int
    callbacks: dict[str, Any]  # their states


def furthest_checkpoint(run: Path) -> Found | None:
    """Return the checkpoint of a run with the most optimizer steps: its last one, or one left by an interruption.

    A run that writes no `last.ckpt` (`checkpoint.save_last: false`) has its numbered ones.

    Raises:
        ConfigError: one of them is damaged.
    """
    return _furthest(_checkpoints(run))


def _checkpoints(run: Path) -> list[Path]:
    """Files and folders of shards from which a run can go on."""
    folder = run / "checkpoints"
    places = [folder / name for name in (*CHECKPOINTS, *(f"{name}{PREVIOUS}" for name in CHECKPOINTS))]
    if not any((folder / name).exists() for name in (LAST, f"{LAST}{PREVIOUS}")):
        places += sorted(set(folder.glob("*.ckpt")) - set(places))
    return [place for place in places if (place / BESIDE_SHARDS if place.is_dir() else place).is_file()]


def _furthest(places: Iterable[Path]) -> Found | None:
    """The checkpoint with the most optimizer steps; of several, the first."""
    found = []
    for place in places:
        values = read_plain(place / BESIDE_SHARDS if place.is_dir() else place, needed=("global_step",))
        found.append(Found(place, int(values["global_step"]), values.get("callbacks", {})))
    return max(found, key=lambda one: one.step, default=None)


def read_plain(path: Path, *, needed: Sequence[str]) -> dict[str, Any]:
    """Load a file that `torch.save` wrote, as plain tensors and values in a dictionary that has the `needed` keys.

    Raises:
        ConfigError: it is no such file, cut short, or holds more than plain values.
    """
    if not zipfile.is_zipfile(path):  # torch.save writes ZIP archives, whose directory stands at their end
        raise ConfigError(f"{path}: not a checkpoint, or one that was cut short; allowed: a .ckpt file, whole")
    try:
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds other objects, and loading these can run code"
        raise ConfigError(f"{path}: cannot be read as plain tensors and values: {reason}") from error
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing:
        raise ConfigError(f"{path}: not a checkpoint of this program (no {' and '.join(missing)})")
    return found


def find_checkpoint(path: str) -> Path:
    """Return the checkpoint itself, or the one of a run directory with the most optimizer steps.

    Raises:
        ConfigError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file() or (place.suffix == ".ckpt" and place.is_dir()) or is_sharded(place):
        return place
    allowed = "allowed: a checkpoint (.ckpt), or a run directory that has one"
    if not place.is_dir():
        raise ConfigError(f"{path!r}: no such checkpoint; {allowed}")
    found = furthest_checkpoint(latest_run(place) or place)
    if found is None:
        raise ConfigError(f"{path!r}: no checkpoint in it; {allowed}")
    return found.path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint as plain values, a sharded one without its weights; what would need code is refused.

    Raises:
        ConfigError: it is no checkpoint of this program, damaged, or holds more than plain values.
    """
    sharded = is_sharded(path)
    needed = ("hyper_parameters", "trained_weights" if sharded else "state_dict")
    checkpoint = read_plain(path / BESIDE_SHARDS if sharded else path, needed=needed)
    check_format(checkpoint, str(path))
    return checkpoint


def check_format(checkpoint: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint whose parts may mean something else than they do here.

    Args:
        checkpoint: as loaded.
        name: of it, for the error.

    Raises:
        ConfigError: its format is newer than this program, is not known, or is not stated.
    """
    found = checkpoint.get(FORMAT_KEY)
    if found == FORMAT:
        return
    if found is None:
        reason = (
            "it does not say its format: it was written by another program, or by a version of this one from before "
            "formats had numbers"
        )
    elif isinstance(found, int) and found > FORMAT:
        reason = f"its format is {found}, newer than this program: install the version that wrote it, or a later one"
    else:
        reason = f"its format {found!r} is not known"
    raise ConfigError(f"{name}: {reason}; allowed: format {FORMAT}")

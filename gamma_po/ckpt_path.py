"""What `--ckpt_path` means: a file, a folder of shards, `last` or `best`; the same one on all processes."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from gamma_po.errors import ConfigError
from gamma_po.ranks import Ranks, lines_of_all
from gamma_po.runs import furthest_checkpoint, read_plain, runs_in
from gamma_po.shards import BESIDE_SHARDS

SINGLE_FILES = {  # strategies that write shards -> what lets them write single files
    "ModelParallelStrategy": "trainer.strategy.init_args.save_distributed_checkpoint: false",
    "FSDPStrategy": "trainer.strategy.init_args.state_dict_type: full",
}
SHORT_NAMES = {"fsdp": "FSDPStrategy"}  # Lightning's, of those
SLURM_FILES = "hpc_ckpt_*"  # the names that Lightning gives them


def settings_file(path: Path, *, strategy: str, weights_only: bool) -> Path:
    """Return the file that holds a checkpoint's settings: the checkpoint, or a file among its shards.

    Args:
        path: a file or a folder, which exists.
        strategy: the trainer's.
        weights_only: nothing may be unpickled; torch unpickles parts of every sharded checkpoint.

    Raises:
        ConfigError: the folder is no sharded checkpoint, or cannot be loaded with this strategy or this safely.
    """
    if not path.is_dir():
        return path
    given = f"ckpt_path={str(path)!r}"
    if not (path / BESIDE_SHARDS).is_file():
        raise ConfigError(f"{given} is a folder, but no sharded checkpoint: it holds no {BESIDE_SHARDS}")
    written_by = str(read_plain(path / BESIDE_SHARDS, needed=("run",))["run"]["strategy"])
    single_files = next((option for name, option in SINGLE_FILES.items() if name in written_by), "any other strategy")
    if written_by not in SHORT_NAMES.get(strategy, strategy):
        raise ConfigError(
            f"{given} is a sharded checkpoint; allowed with it: trainer.strategy: {written_by}. For others, "
            f"write single files: {single_files}"
        )
    if weights_only:
        raise ConfigError(
            f"{given} is a sharded checkpoint, and loading one can run code hidden in it. If you wrote it, add "
            f"--weights_only false. Single files have no such problem: {single_files}"
        )
    return path / BESIDE_SHARDS


def named_checkpoint(keyword: str, folder: Path) -> Path | None:
    """Return what `ckpt_path: last` or `best` means: the run that got furthest among those of one name.

    Args:
        keyword: `last`, or `best` by that run's `checkpoint.monitor` (without one, its latest numbered checkpoint).
        folder: of the runs.

    Returns:
        None if no run there has written a checkpoint: then the training starts.

    Raises:
        ConfigError: the run has no best checkpoint.
    """
    runs = runs_in(folder) if folder.is_dir() else []
    for run in reversed(runs):
        found = furthest_checkpoint(run)
        if found is None:
            continue
        if keyword == "last":
            return found.path
        name = Path(found.callbacks.get("RunCheckpoint", {}).get("best_model_path") or "none").name
        if not (run / "checkpoints" / name).exists():
            raise ConfigError(f"ckpt_path='best': {run} has no best checkpoint; allowed: last, or a file")
        return run / "checkpoints" / name  # by its name only: what is written in a checkpoint is not a path to follow
    return None


def which_checkpoint(path: str, settings: Path, checkpoint: dict[str, Any]) -> str:
    """Return words that tell a checkpoint from any other, by its contents; nothing large is read for it.

    Args:
        path: of the checkpoint.
        settings: the file that holds its settings.
        checkpoint: the contents of that file.
    """
    with zipfile.ZipFile(settings) as archive:
        sums = ",".join(f"{entry.CRC:08x}" for entry in archive.infolist())
    digest = hashlib.sha256(sums.encode()).hexdigest()[:12]
    return f"{path} (step {checkpoint.get('global_step')}, contents {digest})"


def check_no_slurm_files(folder: Path) -> None:
    """Refuse a default folder with checkpoints that Lightning, in a SLURM job, loads without being told, and unchecked.

    Args:
        folder: `trainer.default_root_dir`.

    Raises:
        ConfigError: naming one of them.
    """
    found = next(folder.glob(SLURM_FILES), None)
    if found is not None:
        raise ConfigError(
            f"trainer.default_root_dir={str(folder)!r} holds {found.name!r}, which Lightning loads by itself in a "
            "SLURM job; allowed: null, or a folder without such files. To go on from it, move it away and give its new "
            "place as --ckpt_path"
        )


# --- settings of the module -----------------------------------------------------------------------------------------


def check_same_checkpoint(ranks: Ranks, found: str) -> None:
    """Refuse different checkpoints, on all ranks with the same message.

    Args:
        ranks: the processes of the run.
        found: by this one.

    Raises:
        ConfigError: saying what each has found.
    """
    everyone = lines_of_all(ranks, found)
    if len(set(everyone)) > 1:
        each = "; ".join(f"process {rank} {line}" for rank, line in enumerate(everyone))
        raise ConfigError(
            f"ckpt_path: the processes have found different checkpoints: {each}; allowed: one file that all of them "
            "see, in a folder that the nodes share. If another run still writes there, wait until it has ended"
        )

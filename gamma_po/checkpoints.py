"""What goes into a checkpoint: plain values, trained weights, state of loss and margin; no code, no reference.

A checkpoint is written beside its place and renamed, so that under its name there is only ever a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.files import abandoned, being_written, remove
from gamma_po.flat_sharding import WRAPPER, named_state
from gamma_po.losses import Loss
from gamma_po.margins import KLPool, KLSolver, Margin
from gamma_po.margins.maps import MapShape
from gamma_po.objective import StepState
from gamma_po.ranks import as_one, current_ranks
from gamma_po.registry import plain_config
from gamma_po.runs import PREVIOUS, read_plain
from gamma_po.sharding import disk_errors
from gamma_po.state import state_from_plain

PARTIAL = ".partial"
REMOVING = ".removing"  # of no use to anybody, whichever process gave the name
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def plain_hparams(hparams: MutableMapping[str, Any]) -> None:
    """Turn hyper-parameters into plain values in place, in the form in which LightningCLI reads them.

    The CLI hands over plain values already; a module built by hand has objects. Its optimizer, a function, has
    no plain form and is left out: a module loaded from such a checkpoint gets the default optimizer.
    """
    if "_instantiator" in hparams:
        return
    for key, value in list(hparams.items()):
        if callable(value) and not isinstance(value, (Loss, Margin)):
            del hparams[key]
        else:
            hparams[key] = plain_config(value, with_class_path=(Loss, Margin, MapShape, KLSolver, KLPool))
    hparams["_instantiator"] = INSTANTIATOR


class StraightToFile(TorchCheckpointIO):
    """Writes a checkpoint into its file; Lightning copies it twice in memory, and once into $TMPDIR."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file.

        Args:
            checkpoint: what `torch.save` can write.
            path: of the file, in a folder that is there.
            storage_options: of remote places; none are allowed.

        Raises:
            OSError: the disk refuses, also where torch says only that a position is unexpected.
        """
        if storage_options is not None:
            raise ConfigError(f"storage_options={storage_options!r} of a checkpoint: allowed: null, files are local")
        try:
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder of shards, of which half would be left under its name by a process killed here."""
        path, removing = Path(path), Path(f"{path}{REMOVING}")
        if path.exists():
            remove(removing)
            path.rename(removing)
            with suppress(FileNotFoundError):  # another process starts and removes it, too
                remove(removing)


def tidy(folder: Path, *, for_seconds: float = 0.0) -> None:
    """Remove what was being removed from a folder, written to it or replaced in it when a process was killed.

    What a living process is writing stays, and so does all else.

    Args:
        folder: of checkpoints, or of a run, which exports to it. It may be missing.
        for_seconds: what was half written stays for so long; see `files.abandoned`.
    """
    for left in abandoned(folder, for_seconds=for_seconds):
        place = left.with_name(left.name.removesuffix(PARTIAL))
        with suppress(OSError):
            if place.suffix == ".ckpt" and place.exists():
                remove(place.with_name(place.name + PREVIOUS))
            remove(left)
    for left in folder.glob(f"*.ckpt{REMOVING}"):
        with suppress(OSError):  # in a folder of others, or removed by another process meanwhile
            remove(left)


def save_whole(trainer: Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Write a checkpoint whole or not at all, whatever ends this process at whatever moment. All ranks take part.

    A file takes the place of another in one step. A folder of shards cannot: the old one waits under another name
    (`last.ckpt.previous`) until the new one is in its place, and `ckpt_path: last` looks for it there, too. What a
    disk that takes no more leaves unfinished is removed.

    Args:
        trainer: in training.
        path: of the file, or of the folder with a strategy that saves shards.
        weights_only: leave out what continues the training.

    Raises:
        OSError: the disk refuses; on all ranks, whichever of them it is that cannot write.
    """
    partial = path.with_name(path.name + PARTIAL)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = StraightToFile()
    ranks, first = current_ranks(), trainer.is_global_zero
    with ExitStack() as until_in_place:
        with as_one(ranks):
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
                until_in_place.enter_context(being_written(partial))
                remove(partial)  # left by a process that was killed
        if _saves_shards(trainer.strategy):
            with as_one(ranks):
                partial.mkdir(parents=True, exist_ok=True)  # on every node; while they are written, the ranks meet
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        with _removed_if_unfinished(partial, here=first):
            with as_one(ranks), disk_errors():  # `trainer.save_checkpoint` would leave the others at its own barrier
                trainer.strategy.save_checkpoint(checkpoint, partial)
            with as_one(ranks):
                if first:
                    _to_disk(partial)
        with as_one(ranks):
            if first:
                _put_in_place(partial, path)


def _saves_shards(strategy: Strategy) -> bool:
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def load_plain_files_only(strategy: FSDPStrategy) -> None:
    """Let a strategy refuse checkpoints in one file that are more than plain values.

    FSDPStrategy of Lightning 2.6 unpickles what it finds there, whatever `weights_only` says.
    """
    load = strategy.load_checkpoint

    def checked(path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_file():
            read_plain(Path(path), needed=())
        return load(path, weights_only)

    strategy.load_checkpoint = checked  # type: ignore[method-assign]


def straighten_progress(loops: dict[str, Any], epoch: int) -> None:
    """Correct, in place, what Lightning 2.6 counts wrongly in a run that went on from the end of an epoch.

    Such a run counts one begun epoch, and one completed batch, too few; a run that goes on from *its* checkpoints
    would train an epoch twice.

    Args:
        loops: of a checkpoint.
        epoch: whose batches are being given out, from 0.
    """
    epochs, batches = loops["fit_loop"]["epoch_progress"], loops["fit_loop"]["epoch_loop.batch_progress"]
    if epochs["current"]["completed"] == epoch:  # it is not over
        epochs["current"] |= {"ready": epoch + 1, "started": epoch + 1}
    epochs["total"] = dict(epochs["current"])
    under_way = batches["current"]["processed"] - batches["current"]["completed"]
    batches["total"]["completed"] = batches["total"]["processed"] - under_way


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a checkpoint that is written its name."""
    previous = path.with_name(path.name + PREVIOUS)
    if path.exists() and (partial.is_dir() or path.is_dir()):  # else one before is all that a killed process has left
        remove(previous)
        path.rename(previous)
    os.replace(partial, path)
    _folder_to_disk(path.parent)
    remove(previous)


def _to_disk(path: Path) -> None:
    """Wait until files are on the disk and not only on their way to it."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _removed_if_unfinished(path: Path, *, here: bool) -> Iterator[None]:
    """Where it cannot be finished, remove what is written of a file: it would keep a full disk full."""
    try:
        yield
    except (OSError, RuntimeError):
        if here:
            remove(path)
        raise


def slim_state_dict(module: LightningModule, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the policy's trainable weights; with full training these are all of them."""
    trained = (name for name, parameter in module.policy.named_parameters() if parameter.requires_grad)
    trainable = {name.replace(WRAPPER, "") for name in trained}
    everything = all(parameter.requires_grad for parameter in module.policy.parameters())
    return {
        key: value
        for key, value in state_dict.items()
        if key.startswith("policy.") and (everything or key.removeprefix("policy.") in trainable)
    }


def keep_trained_weights(module: LightningModule, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Drop from a state dict, in place, what `slim_state_dict` drops: as a hook it spares sharded weights the way."""
    kept = slim_state_dict(module, state_dict)
    for name in state_dict.keys() - kept.keys():
        del state_dict[name]


def trained_names(module: LightningModule) -> list[str]:
    """Return what a checkpoint's weights are called, on every process, whoever holds them."""
    state = named_state(module.policy)
    return sorted(slim_state_dict(module, {f"policy.{name}": value for name, value in state.items()}))


def load_step_state(module: LightningModule, checkpoint: dict[str, Any]) -> StepState:
    """Return the state of loss and margin of a checkpoint, after checking that the checkpoint fits the module.

    Raises:
        ConfigError: the checkpoint holds other weights than this module trains, or the state of another loss or margin.
    """
    module.configure_model()
    expected = set(trained_names(module))
    found = set(checkpoint["trained_weights"] if "trained_weights" in checkpoint else checkpoint["state_dict"])
    if found != expected:
        example = sorted(found ^ expected)[0]
        raise ConfigError(
            f"the checkpoint holds {len(found)} trained tensors, this configuration trains {len(expected)}; the first "
            f"difference is {example!r}. Use the lora and policy settings of the run that wrote it"
        )
    return StepState(
        loss=_part_state("loss", module.loss, checkpoint), margin=_part_state("margin", module.margin, checkpoint)
    )


def _part_state(part: str, owner: Loss | Margin, checkpoint: dict[str, Any]) -> Any:
    """The state of the loss or of the margin."""
    try:
        return state_from_plain(owner.init(), checkpoint.get(f"{part}_state", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the checkpoint's {part} state does not belong to the {part} {owner.name!r}: use the {part} of "
            "the run that wrote it"
        ) from error

"""What must match for a checkpoint to be used, and for a training to continue bit for bit."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.loader import TokenBatches
from gamma_po.errors import ConfigError
from gamma_po.fingerprints import Fingerprint, difference
from gamma_po.ranks import Ranks, lines_of_all
from gamma_po.saved import RECORDS, furthest_checkpoint, read_plain
from gamma_po.shards import BESIDE_SHARDS

log = logging.getLogger(__name__)

Resume = Literal["exact", "anyway"]
GO_ON = "--resume anyway goes on all the same"
METHOD = ("loss", "margin", "lora")
TRAINING = ("optimizer", "schedule", "warmup_ratio", "seed")
NUMBERS = ("policy", "reference")  # also reference_model: what they are computed from, and how
PLACES = (".path", ".revision", ".trust_remote_code")  # of a model: moving it changes no number
SINGLE_FILES = {  # strategies that write shards -> what lets them write single files
    "ModelParallelStrategy": "trainer.strategy.init_args.save_distributed_checkpoint: false",
    "FSDPStrategy": "trainer.strategy.init_args.state_dict_type: full",
}
SHORT_NAMES = {"fsdp": "FSDPStrategy"}  # Lightning's, of those
SLURM_FILES = "hpc_ckpt_*"  # the names that Lightning gives them
FIXED = "optimizer.class_path"  # its state in the checkpoint belongs to no other


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
    runs = [] if not folder.is_dir() else [run for run in folder.iterdir() if all((run / n).is_file() for n in RECORDS)]
    for run in sorted(runs, key=lambda run: (run.name[:15], len(run.name), run.name), reverse=True):
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


def check_same_settings(
    saved: dict[str, Any], given: dict[str, Any], *, training: bool, resume: Resume = "exact"
) -> None:
    """Compare the settings a checkpoint was written with to those of the run that is to use it.

    What makes it another method (loss, margin, adapters) must be equal; to continue a training exactly, also what
    else its numbers depend on: optimizer, schedule, seed, and how the models are computed. Where a model lies may
    differ, with a warning.

    Args:
        saved: the checkpoint's hyper-parameters, plain.
        given: the run's, plain, in the same form. A part that one of the two cannot state (an optimizer given as a
            function has no plain form) is not compared.
        training: the run continues the training.
        resume: `anyway` turns into warnings what does not keep the training from going on.

    Raises:
        ConfigError: naming every difference.
    """
    before, now = _flat_settings(saved), _flat_settings(given)
    both = {key.split(".")[0] for key in before} & {key.split(".")[0] for key in now}
    different = {
        key: f"model.{key}: {before.get(key, 'not set')} in the checkpoint, {now.get(key, 'not set')} here"
        for key in sorted({*before, *now})
        if key.split(".")[0] in both and before.get(key, "not set") != now.get(key, "not set")
    }
    refused = [line for key, line in different.items() if _matters(key, training)]
    fixed = FIXED in different and training
    if refused and (resume == "exact" or not training or fixed):
        way_out = f"; {GO_ON}" if training and not fixed else ""
        raise ConfigError(
            f"the checkpoint was written with other settings: {'; '.join(refused)}. Give the same settings, e.g. with "
            f"--config and the config.yaml of the run that wrote it{way_out}"
        )
    for key, line in different.items():
        if _matters(key, training) or key.startswith(NUMBERS):
            log.warning("%s: the run uses what is given here", line)


def _matters(key: str, training: bool) -> bool:
    """Whether a difference in a setting makes other numbers than those the checkpoint comes from."""
    if key.startswith(NUMBERS):
        return training and not key.endswith(PLACES)
    return key.startswith(METHOD + (TRAINING if training else ()))


def _flat_settings(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys to values; classes by their bare names."""
    if not isinstance(value, dict):
        name = str(value).rpartition(".")[2] if key.endswith("class_path") else value
        return {key: name}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if name == "init_args":
            flat |= _flat_settings(inner, key)
        elif not name.startswith("_"):
            flat |= _flat_settings(inner, f"{key}.{name}".removeprefix("."))
    return flat


# --- settings of the run --------------------------------------------------------------------------------------------


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Return what the numbers of a training depend on besides the module's settings; it is kept in checkpoints."""
    data = trainer.datamodule
    of_data = ("batch_size", "length_window", "max_tokens_per_forward", "layout", "label_noise", "label_noise_seed")
    return {
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str.__str__(trainer.gradient_clip_algorithm or "norm"),
        "limit_train_batches": trainer.limit_train_batches,
        **{name: getattr(data, name, None) for name in of_data},
        "data_seed": getattr(data, "seed", None),
        "data": _digest_of_training_data(data),
    }


def _digest_of_training_data(data: Any) -> str | None:
    """Hash of the pairs that training sees; None where other data modules hold them."""
    train = data.datasets.get("train") if isinstance(data, PreferenceDataModule) else None
    return None if train is None else train.digest()


def check_same_weights(what: str, saved: Fingerprint | None, here: Fingerprint | None, resume: Resume) -> None:
    """Refuse to continue a training under another reference, or over another base, of equal shapes.

    Args:
        what: reference, or base (under adapters, which alone are in the checkpoint).
        saved, here: of the checkpoint's and of this run's; None where it is not known.
        resume: `anyway` says that they differ, and goes on.

    Raises:
        ConfigError: they differ.
    """
    different = difference(saved, here)
    if different is None:
        return
    message = f"the checkpoint was written with a {what} of {different}"
    if resume == "exact":
        raise ConfigError(
            f"{message}: it would not continue bit for bit; let model.policy (and model.reference_model, where one is "
            f"set) name the model of the run that wrote it, or {GO_ON}"
        )
    log.warning("%s: what is given here is used", message)


def check_same_run(saved: dict[str, Any], here: dict[str, Any], resume: Resume) -> None:
    """Refuse to continue a training whose numbers would not be those of one that was not interrupted.

    Args:
        saved, here: `run_settings` of the checkpoint and of this run.
        resume: `anyway` says what differs, and goes on.

    Raises:
        ConfigError: naming every difference.
    """
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if not names:
        return
    before, now = (
        ", ".join(f"{name}={'not set' if (value := settings.get(name)) is None else value}" for name in names)
        for settings in (saved, here)
    )
    message = f"the checkpoint was written with {before}, this run has {now}"
    if resume == "exact":
        raise ConfigError(
            f"{message}: it would not continue bit for bit; use the settings of the run that wrote it, or {GO_ON}"
        )
    log.warning("%s: the training goes on with what is given here", message)


def check_end_of_training(checkpoint: dict[str, Any], *, max_steps: int, max_epochs: int | None) -> None:
    """Refuse limits with which Lightning 2.6 counts a finished epoch twice and stops an epoch early, or at once.

    Args:
        checkpoint: as loaded.
        max_steps: the trainer's, -1 for no limit.
        max_epochs: the trainer's, -1 or None for no limit.

    Raises:
        ConfigError: both limits are set and the checkpoint stands between two epochs.
    """
    if "loops" not in checkpoint:
        raise ConfigError("the checkpoint holds weights only (save_weights_only): no training can continue from it")
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    between_epochs = progress["processed"] == progress["started"]
    if between_epochs and max_steps != -1 and max_epochs not in (-1, None):
        raise ConfigError(
            f"trainer.max_steps={max_steps} and trainer.max_epochs={max_epochs} are both set, and the checkpoint "
            "stands between two epochs: the run would stop an epoch early; add --trainer.max_epochs -1 or "
            "--trainer.max_steps -1"
        )


def check_accumulation(trainer: Trainer) -> None:
    """Refuse a GradientAccumulationScheduler: Lightning counts the steps of the whole training without it.

    Raises:
        ConfigError: saying what to use.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise ConfigError(
            "GradientAccumulationScheduler does not work here: the learning rate's schedule would end at another step "
            "than the training, and a run that goes on inside an epoch would take steps of another size; allowed: "
            "trainer.accumulate_grad_batches"
        )


def check_whole_steps(trainer: Trainer) -> None:
    """Refuse to end epochs inside an optimizer step whose micro-batches have different numbers of pairs.

    Args:
        trainer: with its training data loaded.

    Raises:
        ConfigError: pairs of the cut step would weigh more or less than those of others.
    """
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    taken, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    cut = isinstance(batches, TokenBatches) and taken < len(batches) and taken % accumulate > 0
    if cut and not trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} takes {taken} micro-batches, which ends inside "
            f"a step of {accumulate}; with data.length_window={batches.window} these have different numbers of pairs; "
            f"allowed: a multiple of trainer.accumulate_grad_batches={accumulate}, or data.limit_train"
        )


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


def check_validations(trainer: Trainer) -> None:
    """Refuse to validate inside an optimizer step: no checkpoint could be saved with what the validation finds.

    Args:
        trainer: with its training data loaded.

    Raises:
        ConfigError: naming the options and what is allowed.
    """
    accumulate, epoch, every = trainer.accumulate_grad_batches, trainer.num_training_batches, trainer.val_check_batch
    data = trainer.datamodule
    without = isinstance(data, PreferenceDataModule) and "validation" not in data.datasets
    if accumulate == 1 or without or not trainer.enable_validation or trainer.fast_dev_run or every == float("inf"):
        return
    if every is None and trainer._val_check_time_interval is None:
        return  # trainer.limit_train_batches is 0
    if every is None:
        raise ConfigError(
            f"trainer.val_check_interval is a time, {trainer._val_check_time_interval:g} s, and would end inside an "
            f"optimizer step of trainer.accumulate_grad_batches={accumulate} micro-batches; allowed with it: a "
            f"multiple of {accumulate} (micro-batches), or 1.0"
        )
    across = trainer.check_val_every_n_epoch is None  # epochs
    if every % epoch and (every % accumulate or (across and epoch % accumulate)):
        cut = f", where trainer.limit_train_batches makes epochs a multiple of {accumulate}, too," if across else ""
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval} validates every {every} of an epoch's {epoch} "
            f"micro-batches, which is inside an optimizer step of trainer.accumulate_grad_batches={accumulate} "
            f"micro-batches, where no checkpoint can be saved; allowed: a multiple of {accumulate}{cut} or of {epoch}"
        )


# --- going on with other settings -----------------------------------------------------------------------------------


def go_on_as_given(trainer: Trainer, optimizer: Optimizer, schedule: LambdaLR, given: list[dict[str, Any]]) -> None:
    """Take this run's options where torch and Lightning have restored those of the checkpoint.

    Args:
        trainer: at the start of training.
        optimizer: with the checkpoint's state.
        schedule: of its learning rate.
        given: the options of each parameter group as this run made them.
    """
    for group, options in zip(optimizer.param_groups, given, strict=True):
        group.update(options)
    schedule.base_lrs = [options["initial_lr"] for options in given]
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    moved_to = getattr(trainer.train_dataloader, "moved_to", None)
    if moved_to is not None:
        _count_from(trainer, moved_to)


def _count_from(trainer: Trainer, batch: int) -> None:
    """Let the trainer count from another batch of the epoch, where the loader continues at another one."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    moved = batch - progress.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + moved)

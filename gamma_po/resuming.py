"""What must match for a checkpoint to be used, and for a training to continue bit for bit."""

from __future__ import annotations

import logging
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.errors import ConfigError
from gamma_po.fingerprints import Fingerprint, difference

log = logging.getLogger(__name__)

Resume = Literal["exact", "anyway"]
GO_ON = "--resume anyway goes on all the same"
METHOD = ("loss", "margin", "lora")
TRAINING = ("optimizer", "schedule", "warmup_ratio", "seed")
NUMBERS = ("policy", "reference")  # also reference_model: what they are computed from, and how
PLACES = (".path", ".revision", ".trust_remote_code")  # of a model: moving it changes no number
FIXED = "optimizer.class_path"  # its state in the checkpoint belongs to no other


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

"""What goes into a checkpoint: plain values, trained weights, state of loss and margin; no code, no reference."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import Loss
from gamma_po.margins import Margin
from gamma_po.margins.maps import MapShape
from gamma_po.objective import StepState
from gamma_po.registry import plain_config
from gamma_po.state import state_from_plain

log = logging.getLogger(__name__)

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
METHOD = ("loss", "margin", "lora")
TRAINING = ("optimizer", "schedule", "warmup_ratio", "seed")
PLACE = ("policy", "reference")  # also reference_model
BESIDE_SHARDS = "meta.pt"  # Lightning's file for all but weights and optimizer in a sharded checkpoint


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
            hparams[key] = plain_config(value, with_class_path=(Loss, Margin, MapShape))
    hparams["_instantiator"] = INSTANTIATOR


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
    if "ModelParallelStrategy" not in strategy:
        raise ConfigError(
            f"{given} is a sharded checkpoint; allowed with it: trainer.strategy: ModelParallelStrategy. For others, "
            "write single files: trainer.strategy.init_args.save_distributed_checkpoint: false"
        )
    if weights_only:
        raise ConfigError(
            f"{given} is a sharded checkpoint, and loading one can run code hidden in it. If you wrote it, add "
            "--weights_only false. Single files have no such problem: "
            "trainer.strategy.init_args.save_distributed_checkpoint: false"
        )
    return path / BESIDE_SHARDS


def check_same_settings(saved: dict[str, Any], given: dict[str, Any], *, training: bool) -> None:
    """Compare the settings a checkpoint was written with to those of the run that is to use it.

    What makes it another method (loss, margin, adapters; for training also optimizer, schedule and seed) must be
    equal. Where the model lies and how it is computed may differ, with a warning.

    Args:
        saved: the checkpoint's hyper-parameters, plain.
        given: the run's, plain, in the same form.
        training: the run continues the training.

    Raises:
        ConfigError: naming every difference.
    """
    before, now = _flat_settings(saved), _flat_settings(given)
    groups = {key.split(".")[0] for key in before}
    keys = [key for key in sorted({*before, *now}) if key.split(".")[0] in groups]
    different = [
        f"model.{key}: {before.get(key, 'not set')} in the checkpoint, {now.get(key, 'not set')} here"
        for key in keys
        if before.get(key, "not set") != now.get(key, "not set")
    ]
    method = METHOD + (TRAINING if training else ())
    refused = [line for line in different if line.removeprefix("model.").startswith(method)]
    if refused:
        raise ConfigError(
            f"the checkpoint was written with other settings: {'; '.join(refused)}. Give the same settings, e.g. with "
            "--config and the config.yaml of the run that wrote it"
        )
    for line in different:
        if line.removeprefix("model.").startswith(PLACE):
            log.warning("%s: the run uses what is given here", line)


def check_same_accumulation(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Refuse to continue a training with optimizer steps of another size.

    Args:
        checkpoint: as loaded.
        accumulate_grad_batches: the trainer's.

    Raises:
        ConfigError: the checkpoint was written with another number.
    """
    saved = checkpoint.get("accumulate_grad_batches", accumulate_grad_batches)  # absent from older checkpoints
    if saved != accumulate_grad_batches:
        raise ConfigError(
            f"the checkpoint was written with trainer.accumulate_grad_batches={saved}, this run has "
            f"{accumulate_grad_batches}: its steps would hold another number of pairs; give "
            f"--trainer.accumulate_grad_batches {saved}"
        )


def check_end_of_training(checkpoint: dict[str, Any], *, max_steps: int, max_epochs: int | None) -> None:
    """Refuse limits with which Lightning 2.6 counts a finished epoch twice and stops an epoch early, or at once.

    Args:
        checkpoint: as loaded.
        max_steps: the trainer's, -1 for no limit.
        max_epochs: the trainer's, -1 or None for no limit.

    Raises:
        ConfigError: both limits are set and the checkpoint stands between two epochs.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    between_epochs = progress["processed"] == progress["started"]
    if between_epochs and max_steps != -1 and max_epochs not in (-1, None):
        raise ConfigError(
            f"trainer.max_steps={max_steps} and trainer.max_epochs={max_epochs} are both set, and the checkpoint "
            "stands between two epochs: the run would stop an epoch early; add --trainer.max_epochs -1 or "
            "--trainer.max_steps -1"
        )


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


def slim_state_dict(module: LightningModule, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the policy's trainable weights; with full training these are all of them."""
    trainable = {name for name, parameter in module.policy.named_parameters() if parameter.requires_grad}
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
    return sorted(slim_state_dict(module, module.state_dict()))


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

"""What goes into a checkpoint: plain values, trainable weights, the margin's state; never code or a reference."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import Loss
from gamma_po.margins import Margin
from gamma_po.margins.base import state_from_plain
from gamma_po.margins.maps import MapShape
from gamma_po.registry import plain_config

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
            hparams[key] = plain_config(value, with_class_path=(Loss, Margin, MapShape))
    hparams["_instantiator"] = INSTANTIATOR


def slim_state_dict(module: LightningModule, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the policy's trainable weights; with full training these are all of them."""
    trainable = {name for name, parameter in module.policy.named_parameters() if parameter.requires_grad}
    everything = all(parameter.requires_grad for parameter in module.policy.parameters())
    return {
        key: value
        for key, value in state_dict.items()
        if key.startswith("policy.") and (everything or key.removeprefix("policy.") in trainable)
    }


def load_margin_state(module: LightningModule, checkpoint: dict[str, Any]) -> Any:
    """Return the margin state of a checkpoint, after checking that the checkpoint fits the module.

    Raises:
        ConfigError: the checkpoint holds other weights than this module trains, or another margin's state.
    """
    module.configure_model()
    expected = set(slim_state_dict(module, module.state_dict()))
    found = set(checkpoint["state_dict"])
    if found != expected:
        example = sorted(found ^ expected)[0]
        raise ConfigError(
            f"the checkpoint holds {len(found)} trained tensors, this configuration trains {len(expected)}; the first "
            f"difference is {example!r}. Use the lora and policy settings of the run that wrote it"
        )
    try:
        return state_from_plain(module.margin.init(), checkpoint["margin_state"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the checkpoint's margin state does not belong to the margin {module.margin.name!r}: use the margin of "
            "the run that wrote it"
        ) from error

"""The optimizer of a run: what it cannot train, how many steps it takes, and how its gradients are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from gamma_po.errors import ConfigError
from gamma_po.flat_sharding import is_flat

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]


def as_configured(factory: OptimizerFactory) -> OptimizerFactory:
    """Return the factory of an optimizer, whose refusal of a value is a configuration error."""

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        try:
            return factory(parameters)
        except ValueError as error:
            raise ConfigError(f"model.optimizer: {error}") from error

    return make


def check_optimizer(optimizer: Optimizer, *, precision: str, shared_by: str | None) -> None:
    """Refuse an optimizer that would end in a traceback, or in weights that are not numbers, at its first step.

    It is refused before anything is scored.

    Args:
        optimizer: with its weights, in the dtype in which they are trained.
        precision: the trainer's.
        shared_by: name of a strategy that shares each weight between processes, or None.

    Raises:
        ConfigError: naming the options and what is allowed.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    if shared_by is not None and _is_of("bitsandbytes", optimizer):
        raise ConfigError(
            f"model.optimizer={name} does not work with {shared_by}: bitsandbytes cannot update weights that processes "
            "share; allowed: an optimizer of torch.optim, or trainer.strategy: ddp, where each GPU holds the whole "
            "model"
        )
    for group in optimizer.param_groups:
        if all(weight.dtype != torch.float16 for weight in group["params"]):
            continue
        if precision == "16-mixed":
            raise ConfigError(
                "model.policy.dtype=float16 cannot be trained with trainer.precision=16-mixed: its loss scaler needs "
                "gradients in float32; allowed: dtype: float32 (computed in float16 all the same), or model.lora, "
                "whose adapters are float32"
            )
        eps = group.get("eps")
        if isinstance(eps, float) and _is_of("torch", optimizer) and not torch.tensor(eps, dtype=torch.float16):
            raise ConfigError(
                f"model.optimizer.eps={eps} is 0 in float16, in which {name} keeps these weights (trainer.precision="
                f"{precision}) and what it knows of their gradients: its first step would divide by 0; allowed: eps: "
                "0.0001 or so, trainer.precision: bf16-true, or float32 weights with 16-mixed or bf16-mixed"
            )


def steps_in_all(trainer: Trainer) -> int:
    """Return the optimizer steps of the whole training, for the schedule.

    Raises:
        ConfigError: nobody knows.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ConfigError("the schedule needs a known number of steps: set trainer.max_steps or trainer.max_epochs")
    return int(steps)


def clip_gradients(module: LightningModule, optimizer: Optimizer, limit: float | None, kind: str | None) -> None:
    """Clip; also for fused optimizers, which Lightning refuses under bf16-mixed though nothing is scaled there.

    Args:
        module: in training.
        optimizer: of its policy.
        limit: trainer.gradient_clip_val.
        kind: trainer.gradient_clip_algorithm.
    """
    plugin = module.trainer.precision_plugin
    if limit and is_flat(module.policy) and kind != GradClipAlgorithmType.VALUE:
        module.policy.clip_grad_norm_(limit)  # by the norm over all processes
    elif limit and type(plugin) is MixedPrecision and plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, limit, GradClipAlgorithmType(kind or "norm"))
    else:
        module.clip_gradients(optimizer, limit, kind)


def _is_of(package: str, optimizer: Optimizer) -> bool:
    """Whether an optimizer comes from a package, also through a class derived from one of its own."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind not in (Optimizer, object)]
    return any(kind.__module__.partition(".")[0] == package for kind in kinds)

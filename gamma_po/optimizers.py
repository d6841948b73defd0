"""Which weights an optimizer cannot train: refused before anything is scored, not at the first step."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from gamma_po.errors import ConfigError


def check_optimizer(optimizer: Optimizer, *, precision: str, shared_by: str | None) -> None:
    """Refuse an optimizer that would end in a traceback, or in weights that are not numbers, at its first step.

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


def _is_of(package: str, optimizer: Optimizer) -> bool:
    """Whether an optimizer comes from a package, also through a class derived from one of its own."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind not in (Optimizer, object)]
    return any(kind.__module__.partition(".")[0] == package for kind in kinds)

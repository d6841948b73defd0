"""Before anything is timed: both sides compute the same loss and the same gradient.

In float32, at weights off the reference (at the reference DPO's loss is ln 2 whatever the log-probabilities), through
the loops that are timed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duel.plan import ARMS, Setting
from duel.turns import prepare

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # relative
OFF_REFERENCE = 1e-3  # by which the loss must differ from ln 2
NOISE = 0.05  # times 1 / sqrt(inputs of the weight)


class Computed(NamedTuple):
    """One side's loss and gradient at given weights."""

    loss: float
    gradients: dict[str, Tensor]


class Difference(NamedTuple):
    """How far TRL's arm is from ours."""

    arm: str
    our_loss: float
    loss: float  # absolute difference
    gradient: float  # norm of the difference / norm

    @property
    def agrees(self) -> bool:
        """Whether both are the same up to rounding, where the loss says something."""
        off = abs(self.our_loss - math.log(2)) > OFF_REFERENCE
        return off and self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def distinct(arms: Iterable[str]) -> tuple[str, ...]:
    """Leave out arms that differ from others in their batches only."""
    by_kind = {replace(ARMS[name], title="", order="shuffled"): name for name in reversed(list(arms))}
    return tuple(reversed(by_kind.values()))


def perturb(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Move the trainable weights off the reference; return them."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator) * NOISE / math.sqrt(weight.shape[-1])
                weight.add_(noise.to(weight.device))
                moved[name] = weight.detach().clone()
    return moved


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(arm: str, ours: Computed, theirs: Computed) -> Difference:
    """Compare loss and gradient."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    pairs = [(ours.gradients[name], theirs.gradients[name]) for name in ours.gradients]
    apart = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    norm = math.sqrt(sum(float(a.double().square().sum()) for a, _ in pairs))
    return Difference(arm, ours.loss, abs(ours.loss - theirs.loss), apart / norm)


def compare(connection: Connection, setting: Setting, arms: tuple[str, ...]) -> None:
    """Send the difference of each of TRL's arms from ours, in a process of its own.

    Args:
        connection: to the parent.
        setting: float32, two batches, no clipping.
        arms: TRL's.
    """
    prepare(setting)
    weights, ours = _ours(setting)
    connection.send([difference(name, ours, _theirs(setting, name, weights)) for name in arms])


def _ours(setting: Setting) -> tuple[dict[str, Tensor], Computed]:
    """Train a step, move the weights, and look at the second step."""
    from lightning.pytorch import Callback

    from duel.ours import fit

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.weights = perturb(pl_module.policy.model, seed=0)

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.gradients = gradients_of(pl_module.policy.model)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.loss = float(outputs["loss"])

    look = Look()
    fit(setting, ARMS["ours"], look)
    return look.weights, Computed(look.loss, look.gradients)


def _theirs(setting: Setting, name: str, weights: dict[str, Tensor]) -> Computed:
    """TRL's first step on the same batch, at the same weights."""
    from transformers import TrainerCallback

    from duel.theirs import head_of, make_trainer

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if weight.requires_grad:
                        weight.copy_(weights[key])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            self.gradients = gradients_of(model)

    look = Look()
    with head_of(ARMS[name]):
        trainer = make_trainer(setting, ARMS[name], setting.batch("shuffled", 1), look)
        trainer.train()
    return Computed(trainer.last()[0], look.gradients)

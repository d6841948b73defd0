"""Stop a run before broken numbers reach its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from gamma_po.flat_sharding import is_flat, norm_of_all
from gamma_po.ranks import as_one, current_ranks
from gamma_po.types import LossOutput

ROWS_NAMED = 8
SMALLEST_SCALE = 1.0  # a loss scaler starts at 65536; below 1 it makes the loss smaller, and gradients overflow still

POLICY = ("chosen log-probability", "rejected log-probability")
REFERENCE = ("reference's chosen log-probability", "reference's rejected log-probability")


class _Seen(NamedTuple):
    index: Tensor  # [P] rows of the dataset
    names: tuple[str, ...]  # K quantities
    values: Tensor  # [K, P]


class NonFiniteGuard(Callback):
    """Raise before the optimizer steps if a pair or the gradient is not finite; log the gradient's norm.

    Looks at each pair's loss, log-probabilities, reward margin and γ, and at the gradient's norm, with one
    wait for the device per optimizer step. The weights are then still those of the step before. On several
    ranks a NaN loss reaches the others through the averaged gradient, so that all of them stop.

    Float16 with a loss scaler is the exception: there an overflowing gradient is part of the method (the
    scaler skips the step and halves its factor), so the pairs are looked at, and the factor, which is logged: one
    below 1 says that step after step was skipped.

    Raises:
        FloatingPointError: naming the step, the rows of the dataset, what is not finite, and what to try.
    """

    def __init__(self) -> None:
        self._window: list[_Seen] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the micro-batches of an earlier run."""
        self._window = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the micro-batch's numbers until the step."""
        quantities = _quantities(pl_module.last_output)
        values = torch.stack([value.detach().float() for value in quantities.values()])
        self._window.append(_Seen(pl_module.last_batch.index, tuple(quantities), values))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the micro-batches since the last step, and the gradient they made."""
        window, self._window = self._window, []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        norm = torch.zeros(()) if scaler is not None else _gradient_norm(optimizer)
        norm = norm.to(pl_module.device)
        norm = norm_of_all(norm) if is_flat(pl_module.policy) else norm
        checks = [seen.values.isfinite().all() for seen in window] + [norm.isfinite()]
        *pairs_finite, gradient_finite = torch.stack(checks).tolist()
        step = trainer.global_step + 1
        broken = [seen for seen, finite in zip(window, pairs_finite, strict=True) if not finite]
        scale = 1.0 if scaler is None else scaler.get_scale()
        with as_one(current_ranks()):
            if broken:
                raise FloatingPointError(_pairs_message(step, broken, pl_module))
            if not gradient_finite:
                raise FloatingPointError(_gradient_message(step, float(norm), pl_module))
            if not scale >= SMALLEST_SCALE:
                raise FloatingPointError(_scale_message(step, scale))
        if scaler is None:
            pl_module.log("train/grad_norm", norm)  # before clipping, the same on every rank
        else:
            pl_module.log("train/loss_scale", scale)


def _quantities(output: LossOutput) -> dict[str, Tensor]:
    """The numbers to check, causes before consequences."""
    policy, reference = output.evidence.policy, output.evidence.reference
    quantities = dict(zip(POLICY, (policy.chosen, policy.rejected), strict=True))
    if reference is not None:
        quantities |= zip(REFERENCE, (reference.chosen, reference.rejected), strict=True)
    return quantities | {
        "reward margin": output.rewards.margin,
        "γ": output.target_margin,
        "loss": output.per_pair,
    }


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # A sharded gradient's norm is itself sharded.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _pairs_message(step: int, broken: list[_Seen], pl_module: LightningModule) -> str:
    rows: list[str] = []
    affected: list[str] = []
    for seen in broken:
        for row, values in zip(seen.index.tolist(), seen.values.T.tolist(), strict=True):
            bad = {n: v for n, v in zip(seen.names, values, strict=True) if not _is_finite(v)}
            affected += bad
            if bad:
                rows.append(f"row {row}: " + ", ".join(f"{name} is {value}" for name, value in bad.items()))
    more = f"; and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return (
        f"optimizer step {step} was not taken: {len(rows)} pair(s) are not finite. "
        f"{'; '.join(rows[:ROWS_NAMED])}{more}. {_advice(set(affected), type(pl_module.margin).__name__)}"
    )


def _advice(affected: set[str], margin: str) -> str:
    if affected & set(POLICY):
        return (
            "The policy itself gives such log-probabilities: lower the learning rate, clip gradients "
            "(trainer.gradient_clip_val), train in bf16-mixed or 32-true instead of 16-bit, read these rows."
        )
    if affected & set(REFERENCE):
        return "The reference gives such log-probabilities: rebuild its cache with a reference in float32."
    if "reward margin" in affected:
        return "The log-probabilities are finite, the reward is not: lower the loss's beta."
    if "γ" in affected:
        return f"The reward margin is finite, γ is not: check the options of the margin {margin}."
    return "The reward margin and γ are finite, the loss is not: lower the loss's beta."


def _gradient_message(step: int, norm: float, pl_module: LightningModule) -> str:
    gradients = ((n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None)
    first = next((name for name, gradient in gradients if not _all_finite(gradient)), None)
    where = (
        f"the first such parameter is {first}"
        if first
        else "no single value is: another rank's is, or the norm overflows"
    )
    return (
        f"optimizer step {step} was not taken: the gradient's norm is {norm} although this rank's pairs are "
        f"all finite; {where}. Lower the learning rate, train in bf16-mixed or 32-true instead of 16-bit; "
        "on several ranks, look for another rank's message that names pairs."
    )


def _scale_message(step: int, scale: float) -> str:
    return (
        f"optimizer step {step} was not taken, nor were those before it: float16's loss scaler is down at {scale}. It "
        "halves its factor when a gradient overflows and then skips the step; here gradients overflow however small "
        "the loss is made. Lower the learning rate or the loss's beta, train in bf16-mixed or 32-true."
    )


def _all_finite(gradient: Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.isfinite().all())


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")

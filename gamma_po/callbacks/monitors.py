"""How fast a run is, and at which learning rate."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor

from gamma_po.types import PreferenceBatch


class Throughput(Callback):
    """Log `train/pairs_per_second` and `train/tokens_per_second` over all ranks.

    Counted are the pairs and the tokens that the policy has read since the last time, padding left out; a prompt that
    is encoded once for two completions counts once. They are divided by the wall time, that of validation left out.
    Both are logged every `trainer.log_every_n_steps` optimizer steps; nothing waits for the device in between.
    """

    def __init__(self) -> None:
        self._counted: list[Tensor] = []  # [2] per micro-batch: pairs, tokens
        self._since = self._paused_at = 0.0
        self._completed_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._completed_steps = trainer.global_step
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Count the micro-batch; log if it completed a step that is due."""
        self._counted.append(pairs_and_tokens(batch))
        stepped = trainer.global_step > self._completed_steps
        self._completed_steps = trainer.global_step
        every = trainer.log_every_n_steps
        if not stepped or not every or trainer.global_step % every:
            return
        counted = torch.stack(self._counted).sum(0)
        pairs, tokens = (pl_module.ranks.mean(counted) * pl_module.ranks.world_size).tolist()
        seconds = time.perf_counter() - self._since
        pl_module.log_dict(
            {"train/pairs_per_second": pairs / seconds, "train/tokens_per_second": tokens / seconds},
            batch_size=batch.num_pairs,
        )
        self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it run on."""
        self._since += time.perf_counter() - self._paused_at

    def _begin(self) -> None:
        self._counted, self._since = [], time.perf_counter()


class LearningRate(LearningRateMonitor):
    """Lightning's LearningRateMonitor, as `train/lr` at every logged step; silent in a run without a logger."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Find the schedules, where there is somewhere to log to."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log, where there is somewhere to log to."""
        if trainer.loggers:
            super().on_train_batch_start(trainer, *args, **kwargs)


def pairs_and_tokens(batch: PreferenceBatch) -> Tensor:
    """Return how many pairs a batch has, and how many tokens without padding the model reads for them: [2], float64."""
    tokens = sum(
        torch.tensor(rows.input_ids.numel(), device=batch.weight.device)
        if rows.attention_mask is None
        else rows.attention_mask.sum()
        for rows in batch.model_inputs
    )
    return torch.stack([(batch.weight > 0).sum(), torch.as_tensor(tokens)]).double()

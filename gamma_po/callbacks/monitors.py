"""How fast a run is, and at which learning rate."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gamma_po.types import PreferenceBatch


class Throughput(Callback):
    """Log `train/pairs_per_second` and `train/tokens_per_second` over all ranks.

    Counted are the pairs and the tokens that the policy has read since the last time, padding left out; a prompt that
    is encoded once for two completions counts once. They are divided by the wall time of training: validation, and
    what happens between epochs (samples, checkpoints), is left out. Both are logged every `trainer.log_every_n_steps`
    optimizer steps; nothing waits for the device in between.
    """

    def __init__(self) -> None:
        self._counted: list[Tensor] = []  # [2] per micro-batch: pairs, tokens
        self._seconds = 0.0  # up to when the clock was last stopped
        self._started_at: float | None = None  # None while it stands still
        self._completed_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training."""
        self._completed_steps = trainer.global_step
        self._counted, self._seconds, self._started_at = [], 0.0, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Let the clock run on after a validation and what followed it."""
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Count the micro-batch; log if it completed a step that is due."""
        every = trainer.log_every_n_steps
        if not every:
            return
        self._counted.append(pairs_and_tokens(batch))
        stepped = trainer.global_step > self._completed_steps
        self._completed_steps = trainer.global_step
        if not stepped or trainer.global_step % every:
            return
        pairs, tokens = pl_module.ranks.all_gather(torch.stack(self._counted).sum(0)[None]).sum(0).tolist()
        self._stop()
        pl_module.log_dict(
            {"train/pairs_per_second": pairs / self._seconds, "train/tokens_per_second": tokens / self._seconds},
            batch_size=batch.num_pairs,
        )
        self._counted, self._seconds = [], 0.0
        self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def _start(self) -> None:
        if self._started_at is None:
            self._started_at = time.perf_counter()

    def _stop(self) -> None:
        if self._started_at is not None:
            self._seconds += time.perf_counter() - self._started_at
            self._started_at = None


class LearningRate(Callback):
    """Log `train/lr` with the loss of each optimizer step: the rate that the step was taken with."""

    def __init__(self) -> None:
        self._rate: float | Tensor = 0.0
        self._completed_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how many steps were taken before."""
        self._completed_steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Remember the rate, which the schedule changes right after the step."""
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Log it if the micro-batch completed a step."""
        if trainer.global_step > self._completed_steps:
            pl_module.log("train/lr", float(self._rate), batch_size=batch.num_pairs)
        self._completed_steps = trainer.global_step


def pairs_and_tokens(batch: PreferenceBatch) -> Tensor:
    """Return how many pairs a batch has, and how many tokens without padding the model reads for them: [2], int64."""
    counts = [(batch.weight > 0).sum()]
    for rows in batch.model_inputs:
        whole = torch.tensor(rows.input_ids.numel(), device=batch.weight.device)
        counts.append(whole if rows.attention_mask is None else rows.attention_mask.sum())
    return torch.stack([counts[0], torch.stack(counts[1:]).sum()])

"""Log what the target margins of an epoch look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gamma_po.margins.base import strength
from gamma_po.ranks import Ranks
from gamma_po.statistics import margin_statistics
from gamma_po.types import LossOutput, PreferenceBatch

BATCHES_ON_DEVICE = 64


class PairValues(NamedTuple):
    """Numbers of N pairs, float32, on the CPU."""

    target_margin: Tensor  # [N] γ, reward units
    reward_margin: Tensor  # [N] h, reward units
    gradient_weight: Tensor  # [N]


class PairCollector:
    """Collects the numbers of many batches' pairs; padding (weight 0) is left out.

    Values stay on the device for `BATCHES_ON_DEVICE` batches, so that no step waits for a copy.
    """

    def __init__(self) -> None:
        self._on_device: list[Tensor] = []
        self._on_cpu: list[Tensor] = []

    def append(self, output: LossOutput, weight: Tensor) -> None:
        """Add one batch: its output, and the pairs' weights [P]."""
        columns = (output.target_margin, output.rewards.margin, output.gradient_weight, weight)
        self._on_device.append(torch.stack([column.detach().float() for column in columns], dim=1))
        if len(self._on_device) == BATCHES_ON_DEVICE:
            self._move()

    def take(self, ranks: Ranks, device: torch.device) -> PairValues:
        """Return all pairs of all ranks and start again.

        Every rank must call it after the same number of batches; they exchange values on `device`.
        """
        self._move()
        if not self._on_cpu:
            return PairValues(*torch.empty(3, 0))
        rows = torch.cat(self._on_cpu)
        self._on_cpu = []
        valid = rows[rows[:, 3] > 0, :3]
        return PairValues(*ranks.all_gather(valid.to(device)).cpu().unbind(1))

    def _move(self) -> None:
        if self._on_device:
            self._on_cpu.append(torch.cat(self._on_device).cpu())
            self._on_device = []


class GammaStatistics(Callback):
    """Log the statistics of an epoch's target margins, over the pairs of all ranks.

    Keys: `train/gamma/{mean,std,min,max,p10,p50,p90,corr}` (see `gamma_po.statistics`), the mean
    `train/gamma/gradient_weight`, and `train/gamma/strength` = γ0/τ for a KL margin, also reversed or shuffled.
    An epoch resumed in its middle is described by the pairs after the resume.
    """

    def __init__(self) -> None:
        self._pairs = PairCollector()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted epoch left."""
        self._pairs = PairCollector()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Any],
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Collect the batch's pairs."""
        self._pairs.append(outputs["output"], batch.weight)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the epoch's pairs from all ranks and log."""
        values = self._pairs.take(pl_module.ranks, pl_module.device)
        if values.target_margin.numel() == 0:
            return
        logged = dict(margin_statistics(*values))
        ratio = strength(pl_module.margin)
        if ratio is not None:
            logged["strength"] = torch.tensor(ratio)
        # Equal on every rank already; sync_dist only tells Lightning so.
        pl_module.log_dict(
            {f"train/gamma/{name}": value.float().to(pl_module.device) for name, value in logged.items()},
            sync_dist=True,
        )

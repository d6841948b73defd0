"""Write single pairs to disk, so that people can look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gamma_po.callbacks.plots import run_directory
from gamma_po.errors import require
from gamma_po.files import write_bytes
from gamma_po.types import LossOutput, PairLogps, PreferenceBatch


class PairRecorder(Callback):
    """Write the pairs of a micro-batch to Parquet every N optimizer steps.

    `<run directory>/<folder>/step-000050.parquet` holds the last micro-batch of optimizer step 50 (with more
    ranks `step-000050-rank1.parquet`, each its own), one row per pair that counts. The reference's columns
    are null where there is no reference.

    Args:
        every_n_steps: optimizer steps between files, >= 1.
        folder: name of the folder in the run directory.
    """

    def __init__(self, *, every_n_steps: int = 50, folder: str = "pairs") -> None:
        require(every_n_steps >= 1, "PairRecorder.every_n_steps", every_n_steps, "an integer >= 1")
        plain = folder not in ("", ".", "..") and PurePath(folder).name == folder
        require(plain, "PairRecorder.folder", folder, "the plain name of a folder")
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._directory = Path()
        self._completed_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer) / self.folder
        self._completed_steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Any],
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Write the batch if it completed a step that is due."""
        step = trainer.global_step
        due = step > self._completed_steps and step % self.every_n_steps == 0
        self._completed_steps = step
        if not due:
            return
        suffix = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        table = pair_table(outputs["output"], batch, step=step, epoch=trainer.current_epoch)
        write_parquet(table, self._directory / f"step-{step:06d}{suffix}.parquet")


def pair_table(output: LossOutput, batch: PreferenceBatch, *, step: int, epoch: int) -> pa.Table:
    """Return one row per pair of weight > 0.

    Args:
        output: what the step computed for the batch.
        batch: the P pairs.
        step: optimizer steps completed, this one included.
        epoch: epoch of the step, from 0.
    """
    policy, reference = output.evidence.policy, output.evidence.reference
    valid = (batch.weight > 0).cpu()

    def column(values: Tensor, kind: pa.DataType) -> pa.Array:
        values = values.detach().cpu()[valid]
        return pa.array(values.tolist(), kind)

    rows = int(valid.sum())
    return pa.table(
        {
            "step": pa.array([step] * rows, pa.int64()),
            "epoch": pa.array([epoch] * rows, pa.int64()),
            "index": column(batch.index, pa.int64()),
            "flipped": column(batch.flipped.bool(), pa.bool_()),
            "loss": column(output.per_pair, pa.float32()),
            "reward_chosen": column(output.rewards.chosen, pa.float32()),
            "reward_rejected": column(output.rewards.rejected, pa.float32()),
            "reward_margin": column(output.rewards.margin, pa.float32()),
            "target_margin": column(output.target_margin, pa.float32()),
            "gradient_weight": column(output.gradient_weight, pa.float32()),
            "logps_chosen": column(policy.chosen, pa.float32()),
            "logps_rejected": column(policy.rejected, pa.float32()),
            **_reference_columns(reference, column, rows),
            "chosen_length": column(policy.chosen_length.long(), pa.int64()),
            "rejected_length": column(policy.rejected_length.long(), pa.int64()),
        }
    )


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write `table` so that `path` is either absent, as it was, or complete."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def _reference_columns(reference: PairLogps | None, column: Any, rows: int) -> dict[str, pa.Array]:
    names = ("reference_logps_chosen", "reference_logps_rejected")
    if reference is None:
        return {name: pa.nulls(rows, pa.float32()) for name in names}
    return {
        name: column(values, pa.float32())
        for name, values in zip(names, (reference.chosen, reference.rejected), strict=True)
    }

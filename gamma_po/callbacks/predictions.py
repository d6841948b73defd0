"""Per-pair scores of `predict`, as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from gamma_po.files import write_bytes


class PredictionWriter(BasePredictionWriter):
    """Writes `<run directory>/predictions.parquet`: row, log-probabilities, rewards, γ and loss of each pair."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather over ranks and write once, sorted by row."""
        columns = {
            name: pl_module.ranks.all_gather(
                torch.cat([batch[name] for batch in predictions]).to(pl_module.device)
            ).cpu()
            for name in predictions[0]
        }
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # on every process: it asks the first one
        if not trainer.is_global_zero:
            return
        order = columns["index"].argsort()
        table = pa.table({name: values[order].numpy() for name, values in columns.items()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_bytes(folder / "predictions.parquet", sink.getvalue().to_pybytes())

"""Show how γ and the reward margin are distributed over the pairs, and how that changes in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from gamma_po.callbacks.gamma_statistics import PairCollector
from gamma_po.callbacks.plots import run_directory
from gamma_po.errors import require
from gamma_po.plotting import HistogramRow, histogram_over_time_figure, save_figure
from gamma_po.statistics import histogram
from gamma_po.types import PreferenceBatch

LABELS = {"gamma": "target margin γ\n(reward units)", "reward_margin": "reward margin h\n(reward units)"}
POINT_RANGE = 1e-6


class MarginHistograms(Callback):
    """Histograms of γ and of the reward margin, over the pairs of all ranks since the last histogram.

    One is taken every N optimizer steps and one at the end of each epoch, of the pairs left over. Each goes
    to every TensorBoard and Weights & Biases logger of the run as `train/histogram/gamma` and
    `train/histogram/reward_margin`; at the end of the run, also of one that fails or is interrupted, all of them
    together are drawn in `plots/gamma_histogram.png` of the run's directory. A resumed run keeps the earlier ones.
    Values that are not finite are left out.

    Args:
        every_n_steps: optimizer steps between histograms, >= 0; 0 for one per epoch.
        bins: bins of each histogram, >= 1.
    """

    def __init__(self, *, every_n_steps: int = 20, bins: int = 40) -> None:
        require(every_n_steps >= 0, "MarginHistograms.every_n_steps", every_n_steps, "an integer >= 0; 0: per epoch")
        require(bins >= 1, "MarginHistograms.bins", bins, "an integer >= 1")
        self.every_n_steps = every_n_steps
        self.bins = bins
        self.history: dict[str, list[HistogramRow]] = {name: [] for name in LABELS}
        self._pairs = PairCollector()
        self._directory: Path | None = None  # known once training starts
        self._completed_steps = 0
        self._window_start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer)
        self._pairs = PairCollector()
        self._completed_steps = self._window_start = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Any],
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Collect the batch's pairs; take a histogram if the batch completed a step that is due."""
        self._pairs.append(outputs["output"], batch.weight)
        stepped = trainer.global_step > self._completed_steps
        self._completed_steps = trainer.global_step
        if stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._take(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a histogram of the pairs left over."""
        self._take(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw all histograms."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the histograms so far."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The histograms as plain lists and numbers."""
        return {name: [list(row) for row in rows] for name, rows in self.history.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from saved histograms."""
        self.history = {name: [HistogramRow(*row) for row in state_dict[name]] for name in LABELS}

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._pairs.take(pl_module.ranks, pl_module.device)
        start, self._window_start = self._window_start, trainer.global_step
        for name, column in (("gamma", values.target_margin), ("reward_margin", values.reward_margin)):
            finite = column[column.isfinite()]
            if finite.numel():
                self._record(trainer, name, finite, start)

    def _record(self, trainer: Trainer, name: str, values: Tensor, start: int) -> None:
        counts, edges = histogram(values, bins=self.bins, limits=_limits(values))
        row = HistogramRow(start, trainer.global_step, float(edges[0]), float(edges[-1]), counts.tolist())
        self.history[name].append(row)
        key, step = f"train/histogram/{name}", trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(key, values, step)
            elif isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.log_metrics({key: _wandb_histogram(counts, edges)}, step)

    def _draw(self, trainer: Trainer) -> None:
        panels = {LABELS[name]: rows for name, rows in self.history.items() if rows}
        if panels and trainer.is_global_zero and self._directory is not None:
            figure = histogram_over_time_figure(panels, title="Distribution over pairs during training")
            save_figure(figure, self._directory / "plots" / "gamma_histogram.png")


def _wandb_histogram(counts: Tensor, edges: Tensor) -> Any:
    import wandb  # an extra

    return wandb.Histogram(np_histogram=(counts.cpu().numpy(), edges.cpu().numpy()))


def _limits(values: Tensor) -> tuple[float, float]:
    """The values' range, or a range too narrow to see around a value that does not vary."""
    low, high = float(values.min()), float(values.max())
    point = POINT_RANGE * max(1.0, abs(low)) if low == high else 0.0
    return low - point, high + point

"""Draw the curves of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from gamma_po.evaluation.pairs import preferred
from gamma_po.plotting import Series, loss_figure, reward_margin_figure, save_figure
from gamma_po.types import LossOutput, PreferenceBatch

BATCHES_ON_DEVICE = 64
VALIDATION_KEYS = {
    "loss": "val/loss",
    "margin": "val/rewards/margins",
    "accuracy": "val/rewards/accuracies",
}


def run_directory(trainer: Trainer) -> Path:
    """Where the run's files go; every rank must call it.

    `trainer.log_dir`, or `trainer.default_root_dir` where the first logger has no directory.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunPlots(Callback):
    """Draw `plots/loss.png` and `plots/reward_margin.png` in the run's directory when the run ends.

    Training's curves have one point per optimizer step: the mean over the pairs of the first rank.
    Validation's are what the module logged as `val/loss`, `val/rewards/margins` and `val/rewards/accuracies`.
    A run that fails or is interrupted is drawn as far as it came; a resumed run keeps the earlier points.
    """

    def __init__(self) -> None:
        self.train_sums: dict[int, list[float]] = {}  # step -> [weight, weighted loss, margin, accuracy]
        self.validation: dict[str, list[list[float]]] = {name: [] for name in VALIDATION_KEYS}
        self._recent: list[tuple[int, Tensor]] = []
        self._directory: Path | None = None  # known once training starts
        self._completed_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's directory."""
        self._directory = run_directory(trainer)
        self._completed_steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Any],
        batch: PreferenceBatch,
        batch_idx: int,
    ) -> None:
        """Add the batch to the step it belongs to."""
        if not trainer.is_global_zero:
            return
        self._recent.append((self._completed_steps + 1, _weighted_sums(outputs["output"], batch.weight)))
        self._completed_steps = trainer.global_step
        if len(self._recent) == BATCHES_ON_DEVICE:
            self._move()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the module logged in validation."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for name, key in VALIDATION_KEYS.items():
            if key in trainer.callback_metrics:
                self.validation[name].append([trainer.global_step, float(trainer.callback_metrics[key])])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The curves as plain dicts, lists and numbers."""
        self._move()
        return {
            "train_sums": {step: list(sums) for step, sums in self.train_sums.items()},
            "validation": {name: [list(point) for point in points] for name, points in self.validation.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue saved curves."""
        self._recent = []
        self.train_sums = {step: list(sums) for step, sums in state_dict["train_sums"].items()}
        self.validation = {name: [list(p) for p in state_dict["validation"][name]] for name in VALIDATION_KEYS}

    def train_series(self) -> dict[str, Series]:
        """Return the points (step, mean over the step's pairs) of `loss`, `margin` and `accuracy`."""
        self._move()
        rows = [(step, sums) for step, sums in sorted(self.train_sums.items()) if sums[0] > 0]
        names = ("loss", "margin", "accuracy")
        return {name: [(step, sums[k] / sums[0]) for step, sums in rows] for k, name in enumerate(names, start=1)}

    def _move(self) -> None:
        """Add the values still on the device to the sums, with one copy."""
        recent, self._recent = self._recent, []
        if not recent:
            return
        values = torch.stack([sums for _, sums in recent]).tolist()
        for (step, _), sums in zip(recent, values, strict=True):
            before = self.train_sums.get(step, [0.0] * len(sums))
            self.train_sums[step] = [a + b for a, b in zip(before, sums, strict=True)]

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._directory is None:
            return
        train, validation = self.train_series(), self.validation
        if not train["loss"]:
            return
        folder = self._directory / "plots"
        save_figure(loss_figure(train["loss"], validation["loss"]), folder / "loss.png")
        figure = reward_margin_figure(
            margins=train["margin"],
            accuracies=train["accuracy"],
            validation_margins=validation["margin"],
            validation_accuracies=validation["accuracy"],
        )
        save_figure(figure, folder / "reward_margin.png")


def _weighted_sums(output: LossOutput, weight: Tensor) -> Tensor:
    weight, margin = weight.float(), output.rewards.margin.detach().float()
    total = weight.sum()
    loss = output.loss.detach().float()
    return torch.stack([total, loss * total, (weight * margin).sum(), (weight * preferred(margin)).sum()])

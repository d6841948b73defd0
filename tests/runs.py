"""Start runs as the command line does, on the tiny model and data."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gamma_po.callbacks import histograms, plots
from gamma_po.cli import PreferenceCLI


def draw_no_figures(patch: pytest.MonkeyPatch) -> None:
    """Let the figures of runs be made, and only their files be empty: to draw them is half of a tiny run's work."""

    def save(figure: Figure, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    for module in (plots, histograms):
        patch.setattr(module, "save_figure", save)


def arguments(
    model: str, data: dict[str, str], root: Path, options: list[str], config: Path | None = None
) -> list[str]:
    """The options of a tiny run; later ones win."""
    if config is not None:
        return ["--config", str(config), *options]
    return [
        *("--run.root", str(root / "runs")),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--model.policy.path", model),
        *("--model.loss", "DPO", "--model.margin", "KL"),
        *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.003"),
        *("--data.train", data["train"], "--data.validation", data["validation"], "--data.test", data["test"]),
        *("--data.batch_size", "4", "--report.enabled", "false", "--report.sampling.max_new_tokens", "8"),
        *options,
    ]


def fit(model: str, data: dict[str, str], root: Path, options: list[str], config: Path | None = None) -> Path:
    """Run `fit` and return the run's directory."""
    return run("fit", model, data, root, options, config).trainer_dir


class Run:
    """A finished run."""

    def __init__(self, cli: PreferenceCLI) -> None:
        self.cli = cli
        self.trainer_dir = Path(cli.trainer.log_dir)


def run(
    command: str, model: str, data: dict[str, str], root: Path, options: list[str], config: Path | None = None
) -> Run:
    """Run a command in this process."""
    return Run(PreferenceCLI([command, *arguments(model, data, root, options, config)]))


def steps_of(folder: Path, column: str) -> list[float]:
    """The values of a column of metrics.csv, in order."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]

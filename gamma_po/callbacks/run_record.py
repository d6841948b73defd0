"""Say at the start what is in force, and write it down: configuration, versions, commit, seed, command."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gamma_po.commit import source_commit
from gamma_po.files import write_text
from gamma_po.flat_sharding import parameter_counts
from gamma_po.margins.base import strength

PACKAGES = (
    "gamma_po",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "torchmetrics",
    "jsonargparse",
)


class RunRecord(Callback):
    """Writes `config.yaml` and `run.json` into the run's directory and prints a header.

    Args:
        config: the resolved configuration as YAML, if the run came from the command line.
        seed: the run's seed.
    """

    def __init__(self, *, config: str | None = None, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the record before anything long starts."""
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None:
            return
        if self.config is not None:
            write_text(Path(folder) / "config.yaml", self.config)
        write_text(Path(folder) / "run.json", json.dumps(run_facts(self.seed), indent=2) + "\n")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is in force."""
        table = header(trainer, pl_module)  # on every process: `trainer.log_dir` asks the first one
        if trainer.is_global_zero:
            Console().print(table)
        for logger in trainer.loggers:
            logger.log_metrics(data_counts(trainer), step=trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the reference's log-probabilities cost: read from the cache, or scored."""
        costs = getattr(pl_module, "reference_cost", {})
        if costs and trainer.is_global_zero:
            table = _two_columns("reference log-probabilities")
            for split, cost in costs.items():
                table.add_row(split, Text(cost.summary()))
            table.add_row("cache", Text(cost.place()))
            Console().print(table)


def run_facts(seed: int) -> dict[str, Any]:
    """Return versions, commit, platform, command and seed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "command": sys.argv,
        "seed": seed,
        "commit": source_commit(),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _two_columns(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def header(trainer: Trainer, module: LightningModule) -> Table:
    """Return the table of what is in force: formulas, options, data, sizes."""
    table = _two_columns("in force")
    for name, value in [*_model_rows(module), *_data_rows(trainer), ("run directory", str(trainer.log_dir))]:
        table.add_row(name, Text(value))
    return table


def _model_rows(module: LightningModule) -> list[tuple[str, str]]:
    loss, margin = module.loss, module.margin
    rows = [
        ("policy", f"{module.policy_config.path} ({module.policy_config.dtype}), {trainable_share(module)}"),
        ("loss", f"{loss}\n{loss.formula}   [{loss.source}]"),
        ("margin", f"{margin}\n{margin.formula}   [{margin.source}]"),
    ]
    ratio = strength(margin)
    if ratio is not None:
        rows.append(("γ0/τ", f"{ratio:.4g}: in a pool, the largest γ is at most {math.exp(ratio):.4g} × the smallest"))
    rows.append(("reference", "not used" if module.reference is None else module.reference.source))
    return rows


def _data_rows(trainer: Trainer) -> list[tuple[str, str]]:
    datamodule, rows = trainer.datamodule, []
    if datamodule is None:
        return rows
    for split, dataset in datamodule.datasets.items():
        notes = [f"{len(dataset)} pairs from {datamodule.sources[split]}"]
        if dataset.flipped.any():
            notes.append(f"{int(dataset.flipped.sum())} labels flipped")
        counts = datamodule.counts[split]
        notes += [f"{key.replace('_', ' ')}: {n}" for key, n in counts.items() if n and key not in ("pairs", "kept")]
        rows.append((f"data, {split}", "; ".join(notes)))
    per_step = datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    rows.append(("pairs per step", f"{per_step} on {trainer.world_size} process(es), precision {trainer.precision}"))
    return rows


def data_counts(trainer: Trainer) -> dict[str, float]:
    """Return what was truncated, dropped, repeated ... as metrics: `data/train/prompt_truncated` and the like."""
    counts = {} if trainer.datamodule is None else trainer.datamodule.counts
    return {f"data/{split}/{name.replace(' ', '_')}": n for split in counts for name, n in counts[split].items()}


def trainable_share(module: LightningModule) -> str:
    """Return how many parameters train, of how many."""
    trainable, total = parameter_counts(module.policy)
    return f"training {trainable:,} of {total:,} parameters"

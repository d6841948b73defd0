"""A run's memory as `inspect` estimates it, and as its steps take it, on any device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from gamma_po.cli import PreferenceCLI
from gamma_po.commands.inspect import InspectCLI, InspectOptions, read_data
from gamma_po.inspection.cost import Memory, parameter_bytes
from gamma_po.inspection.dry_run import DryRun
from gamma_po.inspection.live import LiveBytes
from gamma_po.inspection.sections import Plan, plan
from tests.runs import arguments

ENOUGH = 2**50


def dry_run(model: str, data: dict[str, str], root: Path, options: list[str]) -> tuple[DryRun, Plan]:
    """What `inspect` has when it comes to the memory of a run."""
    cli = InspectCLI(["fit", *arguments(model, data, root, options)])
    module, datamodule, trainer = cli.model, cli.datamodule, cli.trainer
    module.trainer = trainer
    total = read_data(datamodule, module, trainer, InspectOptions())
    module.configure_model()
    trainer.precision_plugin.convert_module(module.policy.to(trainer.strategy.root_device))
    return DryRun(module, datamodule), plan(trainer, datamodule, total)


def estimated(model: str, data: dict[str, str], root: Path, options: list[str]) -> Memory:
    """The estimate for a run."""
    dry, planned = dry_run(model, data, root, options)
    return dry.memory(planned, ENOUGH)


def taken(model: str, data: dict[str, str], root: Path, options: list[str]) -> int:
    """Bytes at the peak of a run's steps: allocated ones on a GPU; on a CPU, of all tensors that there are."""
    cli = PreferenceCLI([*arguments(model, data, root, options), "--export.enabled", "false"], run=False)
    peak = Peak()
    cli.trainer.callbacks.append(peak)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return peak.bytes


class Peak(Callback):
    """The most that is held from the start of the first step to the end of the last."""

    bytes = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live = LiveBytes()
            self.live.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
        if pl_module.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self.bytes = max(self.bytes, parameter_bytes(pl_module.parameters()) + self.live.mark())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type != "cuda":
            self.live.__exit__(None, None, None)

"""LightningCLI for preference optimization: `fit`, `validate`, `test`, `predict` from YAML."""

from __future__ import annotations

import re
import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gamma_po.callbacks import GammaStatistics, MarginHistograms, NonFiniteGuard, PairRecorder, RunPlots
from gamma_po.callbacks.checkpoint import RunCheckpoint
from gamma_po.callbacks.export import ExportPolicy
from gamma_po.callbacks.interruption import StopBetweenSteps
from gamma_po.callbacks.predictions import PredictionWriter
from gamma_po.callbacks.report import Report
from gamma_po.callbacks.run_record import RunRecord
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.errors import ConfigError, DataError
from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS
from gamma_po.margins.maps import MapShape
from gamma_po.module import PreferenceModule
from gamma_po.rundirs import RunDirectory

CALLBACKS = {
    "guard": NonFiniteGuard,
    "gamma_statistics": GammaStatistics,
    "histograms": MarginHistograms,
    "pair_recorder": PairRecorder,
    "plots": RunPlots,
    "checkpoint": RunCheckpoint,
    "export": ExportPolicy,
    "report": Report,
}


def _class_names() -> dict[str, list[str]]:
    """What may stand behind each injectable key."""
    return {
        "loss": [entry.__name__ for entry in LOSSES.values()],
        "margin": [entry.__name__ for entry in MARGINS.values()],
        "inner": [entry.__name__ for entry in MARGINS.values()],
        "shape": [entry.__name__ for entry in MapShape.__subclasses__()],
    }


class Parser(LightningArgumentParser):
    """A parser whose errors say what is allowed."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with status 2 after the message and, for a loss or margin, the allowed names and options."""
        for hint in hints(message):
            message += f"\n{hint}"
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)


def hints(message: str) -> list[str]:
    """Return what is allowed where a parsing error names a loss, a margin or a map shape."""
    lines = []
    for key, names in _class_names().items():
        if re.search(rf"[.\"']{key}[.\"']|model\.{key}\b|\.{key}\b", message):
            lines.append(f"allowed for {key}: {', '.join(names)}")
    for registry in (LOSSES, MARGINS):
        for entry in registry.values():
            if re.search(rf"\b{entry.__name__}\b", message):
                options = ", ".join(entry.__dataclass_fields__) or "none"  # type: ignore[attr-defined]
                lines.append(f"options of {entry.__name__}: {options}")
    return lines


class PreferenceCLI(LightningCLI):
    """LightningCLI with the project's module, data module and run directories."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        super().__init__(
            PreferenceModule,
            PreferenceDataModule,
            args=args,
            parser_class=Parser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False, "callbacks": []},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, the callbacks every run has, and give module and data the run's seed."""
        parser.add_class_arguments(RunDirectory, "run")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.save_last": True})
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its directory, and CSV and TensorBoard logs in it unless a logger is configured."""
        configured = self._get(self.config_init, "trainer")["logger"]
        if configured is None or configured is True:
            folder = self._get(self.config_init, "run").create()
            place = {"save_dir": folder.parent, "name": "", "version": folder.name}
            kwargs["logger"] = [CSVLogger(**place, flush_logs_every_n_steps=10), TensorBoardLogger(**place)]
        return super().instantiate_trainer(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Keep the resolved configuration for the run's record."""
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand] if self.subcommand else self.config
        self.trainer_defaults["callbacks"] = [
            RunRecord(
                config=parser.dump(config, skip_link_targets=True, skip_unset=False),
                seed=int(config["seed_everything"]),
            ),
            StopBetweenSteps(),
            *([PredictionWriter()] if self.subcommand == "predict" else []),
        ]


def run(arguments: list[str] | None = None) -> int:
    """Parse and run one command; configuration and data errors end in one plain message."""
    try:
        PreferenceCLI(arguments)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0

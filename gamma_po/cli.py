"""LightningCLI for preference optimization: `fit`, `validate`, `test`, `predict` from YAML."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gamma_po.callbacks import GammaStatistics, MarginHistograms, NonFiniteGuard, PairRecorder, RunPlots
from gamma_po.callbacks.checkpoint import RunCheckpoint
from gamma_po.callbacks.export import ExportPolicy
from gamma_po.callbacks.interruption import StopBetweenSteps
from gamma_po.callbacks.monitors import LearningRate, Throughput
from gamma_po.callbacks.predictions import PredictionWriter
from gamma_po.callbacks.report import Report
from gamma_po.callbacks.run_record import RunRecord
from gamma_po.callbacks.same_checkpoint import SameCheckpoint
from gamma_po.callbacks.samples import Samples
from gamma_po.ckpt_path import check_no_slurm_files, named_checkpoint, settings_file, which_checkpoint
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.files import DISK_ADVICE, disk_refuses
from gamma_po.module import PreferenceModule
from gamma_po.parsing import SEEDS, check_carried_options, check_config_files, explain, refusal
from gamma_po.resuming import Resume, check_end_of_training, check_same_settings
from gamma_po.rundirs import RunDirectory
from gamma_po.runs import check_format, read_plain

CALLBACKS = {
    "guard": NonFiniteGuard,
    "gamma_statistics": GammaStatistics,
    "histograms": MarginHistograms,
    "pair_recorder": PairRecorder,
    "plots": RunPlots,
    "throughput": Throughput,
    "learning_rate": LearningRate,
    "samples": Samples,
    "checkpoint": RunCheckpoint,
    "export": ExportPolicy,
    "report": Report,
}
OUR_KEYWORDS = ("best", "last")  # of the runs of the same name
NO_CHECKPOINT = "none"
INTERRUPTED = 130  # the status of a command that was told to stop
RESUME = (
    "What a checkpoint (--ckpt_path) of other settings means. exact: refuse it if the training would not go on bit for "
    "bit as if it had not been interrupted. anyway: say what differs, and go on with what is given here."
)
LESS_MEMORY = (
    "Less memory: model.gradient_checkpointing: true, a lower data.batch_size with a higher "
    "trainer.accumulate_grad_batches, model.lora, a lower data.tokenization.max_length. `inspect` estimates it before "
    "a run; --ckpt_path last goes on from the last checkpoint."
)
log = logging.getLogger(__name__)


def no_advertisement(record: logging.LogRecord) -> bool:
    """Let pass what Lightning says, but for a product that it recommends at every start."""
    return "litlogger" not in record.getMessage()


logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)


class Parser(LightningArgumentParser):
    """A parser whose errors say what is allowed."""

    of_class: type | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Remember whose options these are, where the whole parser is for one class; read no data as settings."""
        if nested_key is None:
            self.of_class = theclass
        if theclass is PreferenceDataModule:  # data.train may be a list of settings, and the name of a file of pairs
            kwargs["sub_configs"] = False
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with status 2 after the message and what is allowed."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [action.dest for action in _actions(parser)]
        sys.stderr.write(f"error: {explain(message, options=known, of_class=self.of_class)}\n")
        raise SystemExit(2)


def _actions(parser: Any) -> list[Any]:
    """The actions of a parser and of its subcommands."""
    inner = [sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()]
    return [*parser._actions, *(action for sub in inner[:1] for action in sub._actions)]


def _check_values(config: Any) -> None:
    """Check values of Lightning's own options that it takes and then fails on."""
    seed, accumulate = config["seed_everything"], config["trainer"]["accumulate_grad_batches"]
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything={seed}: give {SEEDS}")
    accelerator = config["trainer"]["accelerator"]
    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ConfigError(
            f"trainer.accelerator={accelerator!r}: torch {torch.__version__} sees no GPU; allowed: auto, cpu"
        )
    require(accumulate >= 1, "trainer.accumulate_grad_batches", accumulate, "an integer >= 1")


def _tensorboard(place: dict[str, Any]) -> list[TensorBoardLogger]:
    """A TensorBoard logger, where that package is installed (it is an extra)."""
    return [TensorBoardLogger(**place)] if importlib.util.find_spec("tensorboard") else []


class PreferenceCLI(LightningCLI):
    """LightningCLI with the project's module, data module and run directories."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        self.words = sys.argv[1:] if args is None else args
        super().__init__(
            PreferenceModule,
            PreferenceDataModule,
            args=args,
            parser_class=Parser,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False, "callbacks": []},
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Return the command that comes first, else all of them: the options of one take a while to collect."""
        every = super().subcommands()
        first = self.words[0] if isinstance(self.words, list) and self.words else None
        return {first: every[first]} if first in every else every

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed: a number, where Lightning's own option also takes true (any seed) and false (none)."""
        parser.add_argument("--seed_everything", type=int, default=0, help=f"Seed of the run: {SEEDS}.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run directory, the callbacks every run has, and give module and data the run's seed."""
        parser.add_class_arguments(RunDirectory, "run")
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"checkpoint.save_last": True})
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, unless options of one loss or margin would silently pass to another."""
        if isinstance(self.words, list):
            check_config_files(self.words)
            check_carried_options(self.words)
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        if command:
            _check_values(self.config[command])
        if command and self.config[command]["weights_only"] is None:
            self.config[command]["weights_only"] = True  # a checkpoint from elsewhere must not run code

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Add to `fit` what a checkpoint of other settings means."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=Resume, default="exact", help=RESUME)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Check the settings against the checkpoint's; Lightning would overwrite them with the checkpoint's.

        The module checks again what is loaded.
        """
        self.checkpoint_found = NO_CHECKPOINT
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path in OUR_KEYWORDS:
            path = self.config[command]["ckpt_path"] = self._checkpoint_of_runs(command, path)
        if path is None:
            return
        if not Path(path).exists():
            raise ConfigError(f"ckpt_path={path!r}: no such file; allowed: a checkpoint of this program, last, best")
        given = self.config[command]
        strategy, weights_only = str(given["trainer"]["strategy"]), given["weights_only"]
        settings = settings_file(Path(path), strategy=strategy, weights_only=weights_only)
        needed = ("hyper_parameters", "loops") if command == "fit" else ("hyper_parameters",)
        checkpoint = read_plain(settings, needed=needed)
        check_format(checkpoint, path)
        self.checkpoint_found = which_checkpoint(path, settings, checkpoint)
        self._dump_config()
        saved, resume = checkpoint["hyper_parameters"], given.get("resume", "exact")
        check_same_settings(saved, self.config_dump["model"], training=command == "fit", resume=resume)
        if command == "fit":
            limits = given["trainer"]
            check_end_of_training(checkpoint, max_steps=limits["max_steps"], max_epochs=limits["max_epochs"])

    def _checkpoint_of_runs(self, command: str, keyword: str) -> str | None:
        """Find `last` or `best` among the runs of this name; without any, `fit` starts and others fail."""
        run = self.config[command]["run"]
        folder = RunDirectory(run["root"], run["name"]).parent
        found = named_checkpoint(keyword, folder)
        if found is None and command != "fit":
            raise ConfigError(f"ckpt_path={keyword!r}: no run in {str(folder)!r} has a checkpoint")
        said = f"no run in {folder} has a checkpoint: training starts" if found is None else f"going on from {found}"
        log.warning("ckpt_path=%s: %s", keyword, said)
        return None if found is None else str(found)

    def instantiate_classes(self) -> None:
        """Make module, data module and trainer; what a class says against its options is a configuration error.

        Where an option may hold one of several things, jsonargparse wraps what the class has said.
        """
        try:
            super().instantiate_classes()
            self.model.resume = self._get(self.config_init, "resume", default="exact")
            self.datamodule.check_margin(self.model.margin)
        except (ConfigError, DataError, MisconfigurationException):
            raise
        except (ValueError, ImportError) as error:
            raise ConfigError(refusal(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its directory, with a CSV and a TensorBoard log in it; loggers of the configuration come on top.

        The CSV log comes first: `trainer.log_dir` is the first logger's folder. A configured TensorBoard logger stands
        in for the run's own.
        """
        configured = self._get(self.config_init, "trainer")
        chosen, root = configured["logger"], configured["default_root_dir"]
        if root is None:
            kwargs["default_root_dir"] = self._run_folder()
        else:
            check_no_slurm_files(Path(root))
        if chosen is False:
            return super().instantiate_trainer(**kwargs)
        folder = kwargs.get("default_root_dir") or self._run_folder()
        place = {"save_dir": folder.parent, "name": "", "version": folder.name}
        given = [] if chosen in (None, True) else chosen if isinstance(chosen, list) else [chosen]
        own = [] if any(isinstance(logger, TensorBoardLogger) for logger in given) else _tensorboard(place)
        kwargs["logger"] = [CSVLogger(**place, flush_logs_every_n_steps=10), *own, *given]
        return super().instantiate_trainer(**kwargs)

    def _run_folder(self) -> Path:
        """A new folder, made by the first process; the others learn its name from `trainer.log_dir`."""
        directory = self._get(self.config_init, "run")
        return directory.create() if rank_zero_only.rank == 0 else directory.parent / "as-the-first-process-says"

    def before_instantiate_classes(self) -> None:
        """Keep the resolved configuration for the run's record."""
        parser = self._parser(self.subcommand)
        config = self.config[self.subcommand] if self.subcommand else self.config
        self.trainer_defaults["callbacks"] = [
            SameCheckpoint(self.checkpoint_found),
            RunRecord(
                config=parser.dump(config, skip_link_targets=True, skip_unset=False),
                seed=config["seed_everything"],
            ),
            StopBetweenSteps(),
            *([PredictionWriter()] if self.subcommand == "predict" else []),
        ]


def run(arguments: list[str] | None = None) -> int:
    """Parse and run one command; configuration and data errors end in one plain message.

    Args:
        arguments: of the command line, the command first; those of the process if None.

    Returns:
        0; 2 after a wrong configuration or wrong data; 1 where the numbers broke or the disk or the GPU is full; 130
        if interrupted.
    """
    try:
        PreferenceCLI(None if arguments == sys.argv[1:] else arguments)
    except (ConfigError, DataError, MisconfigurationException) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except FloatingPointError as error:
        sys.stderr.write(f"stopped: {error}\n")
        return 1
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"stopped: {str(error).splitlines()[0]} {LESS_MEMORY}\n")
        return 1
    except OSError as error:
        if not disk_refuses(error):
            raise
        sys.stderr.write(f"stopped: {error}; {DISK_ADVICE}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        return INTERRUPTED  # Lightning turns an interruption of its loops into status 1
    return 0

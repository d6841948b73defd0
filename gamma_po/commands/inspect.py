"""`python -m gamma_po inspect`: a dry run of `fit` that says what would happen, and what looks wrong."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn

from gamma_po.callbacks.samples import Samples
from gamma_po.cli import PreferenceCLI
from gamma_po.data.sources import iterate_rows
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.files import DISK_ADVICE, disk_refuses
from gamma_po.flat_sharding import check_flat_sharding
from gamma_po.inspection.cost import WHOLE, Memory, Share, free_memory, parameter_bytes
from gamma_po.inspection.dry_run import DryRun, longest_last, memory_findings, reference_scorer
from gamma_po.inspection.findings import Finding, blocking, verdict
from gamma_po.inspection.flat import flat_share
from gamma_po.inspection.reference_accuracy import (
    ReferenceAccuracy,
    as_examples,
    reference_accuracy,
    reference_findings,
    sample_order,
)
from gamma_po.inspection.sections import (
    Plan,
    accuracy_rows,
    loss_rows,
    memory_rows,
    plan,
    plan_findings,
    policy_rows,
    settings_findings,
    show_data,
    time_rows,
)
from gamma_po.inspection.sharded import (
    NOT_COUNTED,
    computed_memory,
    copy_bytes,
    copy_without_weights,
    even_share,
    without_weights,
)
from gamma_po.inspection.show import duration, facts_table, pair_table
from gamma_po.optimizers import check_optimizer
from gamma_po.policies import DTYPES
from gamma_po.reference import CASTS
from gamma_po.saved import check_start
from gamma_po.sharding import check_sharding

REFUSED = 1


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """How much an inspection looks at.

    Args:
        show: pairs to print token by token.
        sample: pairs, at most, on which the reference's accuracy is measured.
        seconds: time for that measurement, and again for timing training steps; both start what they finish.
        max_pairs: training pairs to read, at most; the rest is counted only.
    """

    show: int = 2
    sample: int = 64
    seconds: float = 6.0
    max_pairs: int = 20_000

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.show >= 0, "inspect.show", self.show, "an integer >= 0")
        require(self.sample >= 1, "inspect.sample", self.sample, "an integer >= 1")
        require(self.seconds > 0, "inspect.seconds", self.seconds, "a number > 0")
        require(self.max_pairs >= 1, "inspect.max_pairs", self.max_pairs, "an integer >= 1")


class InspectCLI(PreferenceCLI):
    """The parser of `fit`, without a run: no directory, no logger, no training."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the inspection's own options."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(InspectOptions, "inspect")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer without loggers, which would make directories; check the one that `fit` would make."""
        configured = self._get(self.config_init, "trainer")
        if configured["logger"] is not False or configured["default_root_dir"] is None:
            self._get(self.config_init, "run").check()
        return LightningCLI.instantiate_trainer(self, **{**kwargs, "logger": False})

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(arguments: list[str]) -> int:
    """Inspect a run; takes the options of `fit`.

    Returns:
        0 if nothing speaks against the run, 1 if it would fail or is likely wrong, 130 if interrupted.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    console = Console()
    try:
        findings = inspect_run(InspectCLI(["fit", *arguments]), console)
    except (ConfigError, DataError, MisconfigurationException, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return REFUSED
    except OSError as error:
        if not disk_refuses(error):
            raise
        sys.stderr.write(f"stopped: {error}; {DISK_ADVICE}\n")
        return REFUSED
    except SystemExit as end:  # the parser has said what is wrong, or printed its help
        return REFUSED if end.code else 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return REFUSED if blocking(findings) else 0


def inspect_run(cli: PreferenceCLI, console: Console) -> list[Finding]:
    """Print what a run would do, section by section, and return what was found.

    Args:
        cli: parsed, its classes made.
        console: where to print.
    """
    began = time.perf_counter()
    options: InspectOptions = cli._get(cli.config_init, "inspect")
    module, datamodule, trainer = cli.model, cli.datamodule, cli.trainer
    check_strategy(module, trainer)
    check_optimizer_of(module, trainer)
    console.print(facts_table("the loss", loss_rows(module)))
    total = read_data(datamodule, module, trainer, options)
    for callback in trainer.callbacks:
        if isinstance(callback, Samples):
            callback.check(trainer)
    planned = plan(trainer, datamodule, total)
    show_pairs(datamodule, module.tokenizer, options.show, console)
    findings = show_data(datamodule, module.tokenizer, total, console) + plan_findings(planned)
    free, share, copy = free_memory(trainer.strategy.root_device), WHOLE, None
    if sharing_processes(trainer) > 1:
        for config in module.model_configs:
            check_start(config)
        module.policy, copy = without_weights(module), copy_without_weights(module)
        share = share_of(module.policy, copy, trainer)
    if share != WHOLE and parameter_bytes(module.policy.parameters()) + copy_bytes(copy) > free:
        findings += show_arithmetic(module, copy, datamodule, share, free, console)
    else:
        module.policy = None
        findings += show_measured(module, datamodule, trainer, planned, share, free, options, console)
    console.print(verdict(findings))
    console.print(f"inspected in {duration(time.perf_counter() - began)}; no run was started")
    return findings


def check_strategy(module: Any, trainer: Trainer) -> None:
    """Refuse what the run's processes would refuse when they share the weights.

    Raises:
        ConfigError: the policy or the reference cannot be sharded so.
    """
    strategy, module.trainer = trainer.strategy, trainer
    if isinstance(strategy, FSDPStrategy):
        for config in module.model_configs:
            check_flat_sharding(config, strategy, trainer.precision, processes=trainer.world_size)
    if not isinstance(strategy, ModelParallelStrategy):
        return
    processes, tensor, data = trainer.world_size, strategy._tensor_parallel_size, strategy._data_parallel_size
    tensor = strategy.num_processes if tensor == "auto" else tensor  # as Lightning decides it once the run starts
    data = strategy.num_nodes if data == "auto" else data
    for config in module.model_configs:
        check_sharding(config, trainer.precision, processes=processes, tensor_parallel=tensor)
    allowed = f"{processes}, the number of all processes"
    require(data == processes, "trainer.strategy.data_parallel_size", data, allowed)


def check_optimizer_of(module: Any, trainer: Trainer) -> None:
    """Refuse an optimizer that the run would refuse for its weights, with one weight of their dtype in their place.

    Raises:
        ConfigError: it cannot train them.
    """
    strategy, precision = trainer.strategy, trainer.precision
    stored = torch.float32 if module.lora is not None else DTYPES[module.policy_config.dtype]  # peft's adapters
    weight = nn.Parameter(torch.zeros(2, 2, dtype=CASTS.get(precision, stored)))
    shared_by = type(strategy).__name__ if isinstance(strategy, ModelParallelStrategy | FSDPStrategy) else None
    check_optimizer(module.optimizer_factory([weight]), precision=precision, shared_by=shared_by)


def sharing_processes(trainer: Trainer) -> int:
    """Return how many processes share the policy's weights; 1 where each holds all of them."""
    return trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy) else 1


def share_of(policy: Any, copy: Any, trainer: Trainer) -> Share:
    """Return what each process holds of models whose weights the processes share.

    Args:
        policy: not sharded; its weights may be missing.
        copy: of the reference, likewise; None where there is none.
        trainer: of the run.
    """
    of_strategy = flat_share if isinstance(trainer.strategy, FSDPStrategy) else even_share
    return of_strategy(policy, copy, trainer.precision, trainer.world_size)


def show_measured(
    module: Any,
    datamodule: Any,
    trainer: Trainer,
    planned: Plan,
    share: Share,
    free: int,
    options: InspectOptions,
    console: Console,
) -> list[Finding]:
    """Load the models; print what is trained, the reference's accuracy and the cost, and judge them."""
    module.configure_model()
    trainer.precision_plugin.convert_module(module.policy.to(trainer.strategy.root_device))
    console.print(facts_table("the policy", policy_rows(module)))
    findings = settings_findings(module, datamodule)
    found = measure_reference(module, datamodule, options)
    console.print(facts_table("the reference before training", accuracy_rows(found)))
    findings += reference_findings(found)
    if found.finite:
        dry, per_pair = DryRun(module, datamodule), found.seconds_per_pair
        findings += show_cost(dry, planned, share, per_pair, free, options, console)
    return findings


def show_arithmetic(
    module: Any, copy: Any, datamodule: Any, share: Share, free: int, console: Console
) -> list[Finding]:
    """Print what each process would hold of a model that does not fit here as a whole; nothing is measured.

    Args:
        module: its policy `without_weights`.
        copy: of the reference, or None.
        datamodule: set up.
        share: of a process.
        free: bytes on the device.
        console: where to print.
    """
    console.print(facts_table("the policy", policy_rows(module)))
    findings = settings_findings(module, datamodule)
    dataset, batch_size = datamodule.datasets["train"], datamodule.batch_size
    device = module.trainer.strategy.root_device
    batch = datamodule.collate(as_examples(dataset, longest_last(dataset)[-1:])).to(device)
    whole = computed_memory(module, copy, batch, batch_size)
    memory = whole.shared(share)._replace(undivided=share.undivided)
    title = f"memory of each of {share.processes} processes at the peak of a step, computed; {NOT_COUNTED}"
    console.print(facts_table(title, memory_rows(memory, free)))
    problem = "the whole model does not fit into one process here: reference and time are not measured"
    findings.append(Finding("note", problem, "nothing; experiments/SCALING.md has the memory of such runs"))
    return findings + judge_memory(memory, module, batch_size, free, share.processes)


def judge_memory(memory: Memory, module: Any, batch_size: int, free: int, shared_by: int) -> list[Finding]:
    """Compare the memory of one process with what is free."""
    checkpointing, lora = bool(module.gradient_checkpointing), module.lora is not None
    given = {"lora": lora, "checkpointing": checkpointing, "batch_size": batch_size}
    return memory_findings(memory.total, free, holes=memory.holes, shared_by=shared_by, **given)


def read_data(datamodule: Any, module: Any, trainer: Trainer, options: InspectOptions) -> int:
    """Read and tokenise the splits, and return how many training pairs the run will have.

    A large training set is read in part; then the number is an estimate.
    """
    trainer.datamodule, datamodule.trainer = datamodule, trainer
    datamodule.tokenizer = module.tokenizer
    source = datamodule.sources["train"]
    if source is None:
        raise ConfigError("data.train is not set; `fit` needs it: a file, package:NAME/file or hub name")
    own_limits = [None] if isinstance(source, str) else [part.limit for part in source]
    paths = [source] if isinstance(source, str) else [part.path for part in source]
    limit = datamodule.limits["train"]
    wanted = [min(n for n in (limit, own, math.inf) if n is not None) for own in own_limits]
    rows = [
        sum(1 for _ in islice(iterate_rows(p), None if n == math.inf else n))
        for p, n in zip(paths, wanted, strict=True)
    ]
    share = min(1.0, options.max_pairs / sum(rows))
    if share < 1:
        datamodule.limits["train"] = max(1, options.max_pairs // len(rows))
    datamodule.setup("fit")
    here = len(datamodule.datasets["train"])
    return here if share == 1 else int(here * sum(rows) / sum(min(n, datamodule.limits["train"]) for n in rows))


def show_pairs(datamodule: Any, tokenizer: Any, number: int, console: Console) -> None:
    """Print a few random training pairs, token by token."""
    dataset = datamodule.datasets["train"]
    rows = sample_order(len(dataset), datamodule.seed)[:number]
    if rows:
        console.print(pair_table(as_examples(dataset, rows), tokenizer))


def measure_reference(module: Any, datamodule: Any, options: InspectOptions) -> ReferenceAccuracy:
    """Score a seeded sample of the training pairs under the reference."""
    with reference_scorer(module) as score:
        return reference_accuracy(
            datamodule.datasets["train"],
            [preference.prompt for preference in datamodule.preferences["train"]],
            score,
            datamodule.collate,
            sample=options.sample,
            batch_size=min(4, datamodule.eval_batch_size),
            seed=datamodule.seed,
            seconds=options.seconds,
        )


def show_cost(
    dry: DryRun,
    planned: Plan,
    share: Share,
    per_pair: float,
    free: int,
    options: InspectOptions,
    console: Console,
) -> list[Finding]:
    """Print memory and time, and judge the memory; what cannot fit is not tried.

    Args:
        dry: computes micro-batches of the run.
        planned: how often what happens.
        share: of a process.
        per_pair: of the reference, [s].
        free: bytes on the device before anything was loaded.
        options: of the inspection.
        console: where to print.
    """
    module, datamodule, step = dry.module, dry.datamodule, None
    memory = dry.memory(planned, free, share=share)
    if memory.total - memory.undivided <= free:  # of this process alone
        step = dry.seconds_per_step(seed=datamodule.seed, seconds=options.seconds)
    title = "memory at the peak of a step, estimated"
    if share != WHOLE:
        memory = memory.shared(share)
        title = f"memory of each of {share.processes} processes at the peak of a step, estimated"
    console.print(facts_table(title, memory_rows(memory, free)))
    cached = module.reference is not None and module.reference.source == "cached"
    rows = time_rows(planned, datamodule.batch_size, step, per_pair if cached else None)
    console.print(facts_table("time, measured on this machine", rows))
    return judge_memory(memory, module, datamodule.batch_size, free, share.processes)

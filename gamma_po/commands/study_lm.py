"""Studies on a language model: arms × flip rates × seeds, each an ordinary `fit` run in a directory of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml
from rich.console import Console

from gamma_po.errors import ConfigError, DataError, require
from gamma_po.files import write_text
from gamma_po.progress import track
from gamma_po.studies.lm_folder import check_same_study, claimed
from gamma_po.studies.lm_outcome import training_rows
from gamma_po.studies.lm_plan import LanguageStudy, PlannedRun, Unit, option, plan, put, share_of
from gamma_po.studies.lm_study import (
    collect,
    matched_config,
    read_result,
    slope_of,
    training_pairs,
    write_absence,
    write_result,
)
from gamma_po.studies.report import print_study, write_study, write_table
from gamma_po.studies.running import available_workers, end_with_parent
from gamma_po.studies.study import Study

SHARD = re.compile(r"(\d+)/(\d+)")
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(LanguageStudy):
    """What to run, and where.

    Args:
        output: folder of the study: runs, results, and in the end tables and figures. Given again, it continues.
        fit: YAML file of an ordinary run, from which every run's configuration is derived.
        arms: by name; the first is the base loss. Fields: set, against, matched_to, without_flipped, noise.
        noise: shares of labels flipped, each in [0, 0.5).
        seeds: how many; a seed is that of flips, batch order, adapters and samples. All seeds have the same training
            pairs and test prompts, so intervals over seeds hold for these pairs and prompts.
        set: options of `fit` that all runs share, by their dotted names.
        gold_columns: columns of the test set with the gold rewards of its chosen and rejected completions.
        kls: KLs at which policies are compared on the reference's answers, by rescaling; the first is in the tables.
        margin: smallest difference of interest, of win rates.
        only: run these arms, the first of `arms` among them, and leave out the others; null for all.
        device: cpu, a process per worker with one thread; or gpu, a process per GPU.
        workers: processes; by default one per processor or GPU.
        shard: i/n, the i-th of n shares of the runs, i from 0; or slurm, for the shares of a SLURM array. The tables
            come from the same command without a shard, when all are done.
    """

    output: str
    device: Literal["cpu", "gpu"] = "cpu"
    workers: int | None = None
    shard: str | None = None


def run_language_study(options: LanguageOptions, arguments: Sequence[str]) -> int:
    """Run what is not finished yet; then, unless this is a share of the runs, compare.

    Returns:
        0; 1 if a run or a check failed; 130 if interrupted.
    """
    check_workers(options.workers)
    names = [own.name for own in fields(LanguageStudy)]
    study = LanguageStudy(**{name: getattr(options, name) for name in names})
    folder, start = Path(options.output).expanduser().resolve(), time.monotonic()
    units = plan(study, folder, options.device)
    check_same_study(study, units, folder, options.device)
    if status := carry_out(study, units, folder, options.device, options.workers, options.shard):
        return status
    if options.shard is not None:
        mine = share_of(units, *shard_of(options.shard))
        sys.stdout.write(f"{len(mine)} of {len(units)} units are done; when all are, give no shard to compare\n")
        return 0
    return compared(collect(study, units, folder), folder, arguments, start)


def check_workers(workers: int | None) -> None:
    """Refuse a number of processes that is none."""
    require(workers is None or workers >= 1, "workers", workers, "an integer >= 1")


def carry_out(
    study: LanguageStudy, units: Sequence[Unit], folder: Path, device: str, workers: int | None, shard: str | None
) -> int:
    """Run what has no result yet, or a share of it, and say what failed.

    Returns:
        0; 1 if a run failed; 130 if interrupted.
    """
    mine = units if shard is None else share_of(units, *shard_of(shard))
    failed = execute(study, mine, folder, device, workers or slots(device))
    for name, reason in failed.items():
        sys.stderr.write(f"{name}: {reason}\n")
    if failed:
        return INTERRUPTED if "interrupted" in failed.values() else 1
    return 0


def compared(result: Study, folder: Path, arguments: Sequence[str], start: float) -> int:
    """Print and write a finished study; return 1 if a check failed, else 0."""
    print_study(result, Console())
    write_study(result, folder, ["python", "-m", "gamma_po", "study", *arguments], time.monotonic() - start)
    write_table(training_pairs(result.rows, folder), folder / "pairs.parquet")
    sys.stdout.write(f"written to {folder}\n")
    return 0 if result.passed else 1


def shard_of(text: str) -> tuple[int, int]:
    """Return index and count of a share of the runs.

    Raises:
        ConfigError: not i/n, SLURM's variables are not there, or its array has gaps.
    """
    if text == "slurm":
        values = [os.environ.get(name) for name in SLURM]
        if None in values:
            raise ConfigError(f"shard=slurm needs the variables of a SLURM array: {', '.join(SLURM)}")
        number, first, last, count = map(int, values)  # type: ignore[arg-type]
        if last - first + 1 != count:
            raise ConfigError(
                f"shard=slurm: an array of {count} tasks from {first} to {last} has gaps; allowed: an array such as "
                "0-9, whole and without a step, or --shard i/n in its script"
            )
        return number - first, count
    found = SHARD.fullmatch(text)
    if found is None:
        raise ConfigError(f"shard={text!r} is not allowed; allowed: i/n with 0 <= i < n, or slurm")
    return int(found[1]), int(found[2])


def slots(device: str) -> int:
    """How many processes fit: one per processor or GPU."""
    if device == "cpu":
        return available_workers()
    count = torch.cuda.device_count()
    require(count > 0, "device", device, "cpu; there is no GPU here")
    return count


def execute(study: LanguageStudy, units: Sequence[Unit], folder: Path, device: str, workers: int) -> dict[str, str]:
    """Run what has no result yet; return what failed, by name of the run."""
    todo = [unit for unit in units if any(read_result(folder, run) is None for run in unit)]
    label = f"runs, {len(units) - len(todo)} of {len(units)} were finished before"
    failed: dict[str, str] = {}
    if not todo:
        return failed
    if min(workers, len(todo)) == 1:
        _take_slot(None, device)
        for unit in track(todo, label):
            failed |= run_unit(study, unit, folder)
            if "interrupted" in failed.values():
                break
        return failed
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for number in range(workers):
        free.put(number)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(free, device)) as pool:
        futures = [pool.submit(run_unit, study, unit, folder) for unit in todo]
        for future in track(_finished(futures), label, total=len(todo)):
            failed |= future.result()
            if "interrupted" in failed.values():
                pool.shutdown(cancel_futures=True)
                break
    return failed


def _finished(futures: Sequence[Future[dict[str, str]]]) -> Iterator[Future[dict[str, str]]]:
    yield from as_completed(futures)


def _start_worker(free: Any, device: str) -> None:
    end_with_parent()
    _take_slot(free.get(), device)


def _take_slot(number: int | None, device: str) -> None:
    """Take a processor, or the GPU of this number, for all runs of this process."""
    if device == "cpu":
        torch.set_num_threads(1)
    elif number is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",")[number] if visible else str(number)
        os.environ["CUDA_VISIBLE_DEVICES"] = own  # before this process has asked for a GPU


def run_unit(study: LanguageStudy, unit: Unit, folder: Path) -> dict[str, str]:
    """Run a run and its controls as far as they are not finished; return what failed."""
    for run in unit:
        try:
            with claimed(folder, run):
                reason = None if read_result(folder, run) is not None else run_one(study, run, folder)
        except (OSError, DataError) as error:  # a file of this run; others may still succeed
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            return {run.name: reason}
    return {}


def run_one(study: LanguageStudy, run: PlannedRun, folder: Path) -> str | None:
    """Run one `fit` with its own configuration and write its result; return why it failed, None if it did not."""
    from gamma_po.cli import run as run_command

    start, config = time.monotonic(), run.config
    if run.follows is not None:
        slope = slope_of(folder, run.follows)
        if not slope.has_control:
            write_absence(folder, run, f"the fitted slope b={slope.b:.3g} is not positive; no β matches it")
            return None
        config = matched_config(run, slope)
    config = placed(config, run, folder)
    place = folder / "runs" / run.name
    write_text(place / "config.yaml", yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    before = {path for path in place.iterdir() if path.is_dir()}
    words = ["fit", "--config", str(place / "config.yaml")]
    with contextlib.ExitStack() as during:
        log = during.enter_context(open(place / "log.txt", "a"))
        during.enter_context(contextlib.redirect_stdout(log))
        during.enter_context(contextlib.redirect_stderr(log))
        during.enter_context(messages_go_to(log))
        during.enter_context(command_line(words))
        status = status_of(run_command, words)
    gc.collect()
    if status:
        return "interrupted" if status == INTERRUPTED else f"`fit` ended with status {status}; see {place / 'log.txt'}"
    (directory,) = {path for path in place.iterdir() if path.is_dir()} - before
    done = PlannedRun(**{**vars(run), "config": config})
    try:
        write_result(study, folder, done, directory, time.monotonic() - start)
    except DataError as error:
        return str(error)
    return None


def status_of(command: Callable[[list[str]], int], words: list[str]) -> int:
    """Return a command's status, also of one that ends by SystemExit: Lightning turns an interruption into one."""
    try:
        return command(words)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                return INTERRUPTED
            cause = cause.__cause__ or cause.__context__
        return end.code if isinstance(end.code, int) else 1


@contextlib.contextmanager
def messages_go_to(file: TextIO) -> Iterator[None]:
    """Let loggers write to a file what they would to the terminal: their handlers keep the stream they began with."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = {handler for logger in loggers for handler in logger.handlers if type(handler) is logging.StreamHandler}
    before = {handler: handler.stream for handler in handlers}
    try:
        for handler in handlers:
            handler.stream = file
        yield
    finally:
        for handler, stream in before.items():
            handler.stream = stream


@contextlib.contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """Let the process look as if it had been started with these words, which a run records."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def placed(config: dict[str, Any], run: PlannedRun, folder: Path) -> dict[str, Any]:
    """Return the configuration with the run's directory and, for the oracle, its training pairs."""
    put(config, "run", {"root": str(folder / "runs"), "name": run.name})
    if run.without_flipped:
        file = folder / "data" / f"{run.name}.jsonl"
        training_rows(config, run.flip_rate, run.seed, file)
        for key, value in {"data.train": str(file), "data.limit_train": None}.items():
            put(config, key, value)
    assert option(config, "run.name") == run.name
    return config

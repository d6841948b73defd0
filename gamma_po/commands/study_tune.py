"""Tuned studies on a language model: every arm tuned on seeds of its own, then compared as `study lm` does."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gamma_po.commands.study_lm import carry_out, check_workers, compared
from gamma_po.files import write_text
from gamma_po.studies.lm_folder import check_same_study
from gamma_po.studies.lm_plan import LanguageStudy, Unit, plan
from gamma_po.studies.lm_study import collect, read_result
from gamma_po.studies.lm_tuning import (
    Tried,
    TunedStudy,
    add_scores,
    best_of,
    evaluation_study,
    extended,
    first_units,
    tuned_rows,
    tuning_study,
    tuning_table,
)
from gamma_po.studies.report import write_parquet
from gamma_po.studies.running import Row
from gamma_po.studies.study import Study
from gamma_po.studies.worlds import TUNING_SEED

FOLLOWERS = "An arm tuned_as another has the options chosen for that; a matched slope follows its arm, run by run."


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TunedStudy):
    """What to run, and where.

    Args:
        output: folder of the study. Given again, it continues. Per flip rate: tuning.parquet, tuned.yaml (a study for
            `study lm`) and evaluation, that study's folder with tables and figures.
        fit: YAML file of an ordinary run, from which every run's configuration is derived.
        arms: by name; the first is the base loss. Fields: set, against, matched_to, without_flipped, noise, and grid
            or tuned_as.
        noise: shares of labels flipped, each in [0, 0.5); arms are tuned for each.
        seeds: how many to compare on, from 0 on.
        set: options of `fit` that all runs share, by their dotted names.
        gold_columns: columns of the test set with the gold rewards of its chosen and rejected completions.
        kls: KLs at which policies are compared on the reference's answers; tuned by the win rate at the first.
        margin: smallest difference of interest, of win rates.
        only: run these arms, the first of `arms` among them, and leave out the others; null for all.
        tuning_seeds: how many to tune on, from 1,000,000 on.
        tuning_set: options of `fit` that tuning runs have instead, e.g. other test pairs, and no samples.
        extensions: how often a grid may be extended where its best configuration lies on an edge.
        device: cpu, a process per worker with one thread; or gpu, a process per GPU.
        workers: processes; by default one per processor or GPU.
        shard: i/n, the i-th of n shares of the runs, i from 0; or slurm, for the shares of a SLURM array. A grid is
            extended when all shares are done, so start them again then; at last the same command without a shard.
    """

    output: str
    device: Literal["cpu", "gpu"] = "cpu"
    workers: int | None = None
    shard: str | None = None


class Stopped(Exception):
    """Not all runs are done; the status says whether that is an error."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_tuned_study(options: TuneOptions, arguments: Sequence[str]) -> int:
    """Tune and compare at every flip rate, as far as that is not done yet.

    Returns:
        0; 1 if a run or a check failed; 130 if interrupted.
    """
    check_workers(options.workers)
    study = TunedStudy(**{own.name: getattr(options, own.name) for own in fields(TunedStudy)})
    folder = Path(options.output).expanduser().resolve()
    check_same_study(study, first_units(study, folder, options.device), folder, options.device)
    found = [0]
    for rate in study.noise:
        try:
            found.append(_at_rate(study, rate, folder / f"noise-{rate:g}", options, arguments))
        except Stopped as stop:
            found.append(stop.status)
            if stop.status:
                break
    return max(found)


def _at_rate(study: TunedStudy, rate: float, folder: Path, options: TuneOptions, arguments: Sequence[str]) -> int:
    """Tune, write what was chosen as a study of its own, and run that."""
    start = time.monotonic()
    tried, rows = _tune(study, rate, folder, options)
    table = tuning_table(study, rate, tried)
    write_parquet(rows, folder / "tuning_runs.parquet")
    write_parquet(table, folder / "tuning.parquet")
    chosen = evaluation_study(study, rate, {name: best_of(name, own) for name, own in tried.items()})
    _write_study(chosen, rate, folder / "tuned.yaml")
    _print_tuning(table, study.metric)
    place = folder / "evaluation"
    units = plan(chosen, place, options.device, cache=folder.parent / "cache")
    check_same_study(chosen, units, place, options.device)
    _carry_out(chosen, units, place, options)
    if options.shard is not None:
        sys.stdout.write("all runs are done; give no shard to compare\n")
        return 0
    result = _as_tuned(collect(chosen, units, place), study, rate, tried)
    return compared(result, place, arguments, start)


def _tune(study: TunedStudy, rate: float, folder: Path, options: TuneOptions) -> tuple[dict[str, Tried], list[Row]]:
    """Run the grids and what extends them; return the mean of every configuration, and all rows."""
    tried: dict[str, Tried] = {}
    rows: list[Row] = []
    todo = {name: arm.configurations() for name, arm in study.at(rate).items() if arm.grid}
    for extension in range(study.extensions + 1):
        count = sum(map(len, todo.values()))
        named = f"extension {extension}" if extension else "grids"
        sys.stdout.write(f"tuning, flips {rate:g}, {named}: {count} configurations × {study.tuning_seeds} seeds\n")
        tuning, owners = tuning_study(study, rate, todo)
        place, cache = folder / "tuning", folder.parent / "cache"
        units = plan(tuning, place, options.device, first_seed=TUNING_SEED, cache=cache)
        found = _carry_out(tuning, units, place, options)
        add_scores(tried, found, owners, study.metric)
        rows += [row | {"arm": owners[row["arm"]][0], "stage": "tuning"} for row in found]
        todo = extended(study, tried)
        if not todo:
            break
    return tried, rows


def _carry_out(study: LanguageStudy, units: Sequence[Unit], folder: Path, options: TuneOptions) -> list[Row]:
    """Run what has no result yet and return all results.

    Raises:
        Stopped: some failed, or other shares of the runs are not done.
    """
    status = carry_out(study, units, folder, options.device, options.workers, options.shard)
    if status:
        raise Stopped(status)
    rows = [read_result(folder, run) for unit in units for run in unit]
    done = [row for row in rows if row is not None]
    if len(done) < len(rows):
        sys.stdout.write(f"{len(done)} of {len(rows)} runs are done; when all are, repeat the command to go on\n")
        raise Stopped(0)
    return done


def _write_study(study: LanguageStudy, rate: float, file: Path) -> None:
    head = (
        f"# Written by `study tune`: every arm with the options tuned at flip rate {rate:g}.\n"
        f"#   python -m gamma_po study lm --config {file} --output DIR\n"
    )
    write_text(file, head + yaml.safe_dump(asdict(study), allow_unicode=True, sort_keys=False))


def _print_tuning(rows: Sequence[Row], metric: str) -> None:
    table = Table(title=f"tuning, flips {rows[0]['flip_rate']:g}: mean {metric}, points", box=box.SIMPLE_HEAD)
    for name in ("arm", "configuration", "mean", "", "on an edge of what was tried"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (row["arm"], row["configuration"], f"{100 * row[metric]:.2f}", "chosen" if row["chosen"] else "")
        table.add_row(*map(Text, (*cells, row["at_edge"] or "-")))
    Console().print(table)


def _as_tuned(result: Study, study: TunedStudy, rate: float, tried: dict[str, Tried]) -> Study:
    """Return a finished comparison with what was tuned for it, and how."""
    title = f"S3, P2, a language model: every arm tuned on {study.tuning_seeds} seeds of its own by {study.metric}"
    others = f"Tuning runs differ in {json.dumps(study.tuning_set)}." if study.tuning_set else ""
    scope = " ".join(text for text in (result.scope, others, FOLLOWERS) if text)
    config = asdict(study) | {"protocol": "P2", "tuned": result.config["arms"]}
    return dataclasses.replace(result, title=title, scope=scope, config=config, tuned=tuned_rows(study, rate, tried))

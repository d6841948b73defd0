"""Testbed S3: from the results of the runs to tables, intervals and verdicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gamma_po.errors import DataError
from gamma_po.files import write_text
from gamma_po.studies.lm_outcome import outcome, read_trace, test_scores
from gamma_po.studies.lm_plan import LanguageStudy, PlannedRun, Unit, beta_of, put
from gamma_po.studies.running import Cell, Row, Trace
from gamma_po.studies.slope import Slope, fit_slope
from gamma_po.studies.study import Study, compare, qualified, reference_check, without_power

LEVELS = (
    "kl", "sample_gold", "sample_kl", "sample_length_policy", "gradient_on_flipped", "flipped", "gamma_mean",
    "gamma_sd", "gamma_range", "ref_acc",
)  # fmt: skip
METRICS = ("sample_win_rate", "pair_accuracy", "win_rate")
SCOPE = (
    "Seeds differ in flips, batch order, adapters and samples; all have the same training pairs and test prompts, so "
    "the intervals are conditional on these pairs and prompts."
)
PAIR_COLUMNS = ("step", "index", "flipped", "reward_margin", "target_margin", "gradient_weight")
ZERO_MARGIN = {"class_path": "Fixed", "init_args": {"gamma": 0.0}}
GPU_TOLERANCE = 0.05  # nats of a completion: kernels on a GPU need not add in the same order twice


def result_file(folder: Path, run: PlannedRun) -> Path:
    """Where a finished run's row is: the file is there if and only if the run is finished."""
    return folder / "results" / f"{run.name}.json"


def write_result(study: LanguageStudy, folder: Path, run: PlannedRun, directory: Path, seconds: float) -> None:
    """Measure a finished run and write its row, whole or not at all."""
    row = outcome(run, directory, study.gold_columns, study.kls) | {"seconds": round(seconds, 1)}
    row["folder"] = str(directory.relative_to(folder))
    write_text(result_file(folder, run), json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def write_absence(folder: Path, run: PlannedRun, reason: str) -> None:
    """Note that a run does not exist, and why."""
    text = json.dumps({"arm": run.arm, "absent": reason}, ensure_ascii=False) + "\n"
    write_text(result_file(folder, run), text)


def read_result(folder: Path, run: PlannedRun) -> Row | None:
    """Return a finished run's row, None if it is not finished."""
    file = result_file(folder, run)
    return json.loads(file.read_text()) if file.is_file() else None


def matched_config(run: PlannedRun, fitted: Slope) -> dict[str, Any]:
    """Return a control's configuration: the same loss at β b with the fixed margin a."""
    config = copy.deepcopy(run.config)
    put(config, "model.loss.init_args.beta", beta_of(run) * fitted.b)
    put(config, "model.margin", {"class_path": "Fixed", "init_args": {"gamma": fitted.a}})
    return config


def slope_of(folder: Path, run: PlannedRun) -> Slope:
    """Fit s(a - b h) to the gradient weights of a finished run."""
    row = read_result(folder, run)
    if row is None or "absent" in row:
        raise DataError(f"{run.name} is not finished, but its control was started")
    trace = read_trace(folder / row["folder"])
    return fit_slope(trace.reward_margin, trace.weight)


def collect(study: LanguageStudy, units: Sequence[Unit], folder: Path) -> Study:
    """Compare all runs of a finished study.

    Raises:
        DataError: a run is not finished.
    """
    runs = [run for unit in units for run in unit]
    found = [(run, read_result(folder, run)) for run in runs]
    if missing := [run.name for run, row in found if row is None]:
        raise DataError(f"{len(missing)} of {len(runs)} runs are not finished, the first of them {missing[0]}")
    rows = [
        {"stage": "control" if run.follows else "arms"} | row
        for run, row in found
        if row is not None and "absent" not in row
    ]
    equal = _equal_to_base(study, rows, folder)
    rows = [row | {"equal_to_base": equal.get(number)} for number, row in enumerate(rows)]
    against = {name: tuple(arm.against) for name, arm in study.chosen.items()}
    metrics = measured_columns(rows, METRICS + tuple(f"win_rate_kl{kl:g}" for kl in study.kls[:1]))
    fitted = {run.follows.arm for run in runs if run.follows}
    counts = {"sample_win_rate": "sample_prompts", "pair_accuracy": "test_pairs"}
    steps = {metric: 0.5 / max(1, *(row[name] for row in rows)) for metric, name in counts.items()}  # ties count half
    traces = _traces(rows, folder, {study.base} | fitted)
    powerless = without_power(rows, metrics, study.base, _oracles(rows), steps)
    return Study(
        title="S3, a language model: one β and learning rate for every arm, unless the arm says otherwise",
        config=asdict(study) | {"protocol": "P1"}, metrics=metrics, rows=rows,
        pairings=qualified(compare(rows, against, metrics, study.margin, steps), powerless), traces=traces,
        slopes={cell: fit_slope(t.reward_margin, t.weight) for cell, t in traces.items() if cell[0] in fitted},
        checks=_checks(study, rows), levels=measured_columns(rows, LEVELS),
        scope=" ".join([SCOPE, *powerless.values()]),
    )  # fmt: skip


def measured_columns(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that all rows have, with a number in at least one: without gold rewards or samples, fewer."""
    return tuple(
        name for name in names if all(name in row for row in rows) and any(row[name] == row[name] for row in rows)
    )


def _traces(rows: Sequence[Row], folder: Path, arms: set[str]) -> dict[Cell, Trace]:
    """Reward margins and gradient weights, pooled over seeds."""
    parts: dict[Cell, list[Trace]] = {}
    for row in rows:
        if row["arm"] in arms:
            parts.setdefault((row["arm"], None, row["flip_rate"]), []).append(read_trace(folder / row["folder"]))
    return {cell: Trace(*map(torch.cat, zip(*found, strict=True))) for cell, found in parts.items()}


def training_pairs(rows: Sequence[Row], folder: Path) -> pa.Table:
    """Return what training asked of every pair in every run: h, γ, gradient weight, whether its label was flipped."""
    tables = []
    for row in rows:
        files = sorted((folder / row["folder"] / "pairs").glob("*.parquet"))
        own = pa.concat_tables([pq.read_table(file, columns=list(PAIR_COLUMNS)) for file in files])
        for name in ("flip_rate", "seed", "arm"):
            own = own.add_column(0, name, pa.array([row[name]] * len(own)))
        tables.append(own)
    return pa.concat_tables(tables)


def _equal_to_base(study: LanguageStudy, rows: Sequence[Row], folder: Path) -> dict[int, float]:
    """Largest difference, in nats, between the test scores with γ = 0 and those of the base loss, by row number."""
    found = {}
    base = {(row["flip_rate"], row["seed"]): row for row in rows if row["arm"] == study.base}
    for number, row in enumerate(rows):
        own = base.get((row["flip_rate"], row["seed"]))
        if own is not None and json.loads(row["margin"]) == ZERO_MARGIN and row["loss"] == own["loss"]:
            mine, other = (test_scores(folder / r["folder"]) for r in (row, own))
            sides = ("logps_chosen", "logps_rejected")
            found[number] = max(float((mine[side] - other[side]).abs().max()) for side in sides)
    return found


def _oracles(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows if row["mask"] == "flipped"))


def _checks(study: LanguageStudy, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """The reference wins half against itself; γ = 0 is the base loss. That the oracle wins is no check but a result."""
    differences = [row["equal_to_base"] for row in rows if row["equal_to_base"] is not None]
    checks = reference_check(rows) if study.gold_columns else []
    if differences:
        allowed = GPU_TOLERANCE if torch.cuda.is_available() else 0.0
        text = f"γ = 0 scores the test pairs as the base loss does: at most {max(differences):.2g} nats apart"
        checks.append((f"{text}, {allowed:g} allowed, in {len(differences)} runs", max(differences) <= allowed))
    return checks

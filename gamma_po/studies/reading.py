"""Read a finished bandit study back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gamma_po.errors import DataError
from gamma_po.studies.figures import Curve
from gamma_po.studies.running import Cell, Row
from gamma_po.studies.slope import Slope
from gamma_po.studies.study import COMPARED

FILES = ("study.json", "runs.parquet", "comparisons.parquet")
SLOPES, CURVES = "slopes.parquet", "gradient_weights.parquet"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a study's folder holds.

    Args:
        title: one line.
        checks: what was checked -> whether it held.
        rows: of the runs that are compared; runs that tuned or chose something are left out.
        comparisons: one per arm, counterpart, ρ, flip rate and metric.
        slopes: matched-slope fits by cell.
        curves: gradient weight by reward margin, by cell.
        missing: what the folder lacks, in words; "" if nothing.
    """

    title: str
    checks: dict[str, bool]
    rows: list[Row]
    comparisons: list[Row]
    slopes: dict[Cell, Slope]
    curves: dict[Cell, Curve]
    missing: str

    @property
    def metric(self) -> str:
        """What is compared at equal KL, the last of the metrics."""
        return self.comparisons[-1]["metric"]


def read_study(folder: str | Path) -> Finished:
    """Read the folder of a finished study.

    Raises:
        DataError: it is no such folder.
    """
    folder = Path(folder).expanduser()
    if absent := [name for name in FILES if not (folder / name).is_file()]:
        raise DataError(f"{folder}: no {', '.join(absent)}; allowed: the --output folder of a finished study")
    record = json.loads((folder / "study.json").read_text())
    rows = [row for row in _read(folder / "runs.parquet") if row["stage"] in COMPARED]
    lacking = [name for name in (SLOPES, CURVES) if not (folder / name).is_file()]
    text = f"{folder} has no {' and no '.join(lacking)}: an earlier version wrote it. Run the study again to see them."
    return Finished(
        title=record["title"], checks=record["checks"], rows=rows, comparisons=_read(folder / "comparisons.parquet"),
        slopes={} if SLOPES in lacking else _slopes(folder / SLOPES),
        curves={} if CURVES in lacking else _curves(folder / CURVES),
        missing=text if lacking else "",
    )  # fmt: skip


def _read(file: Path) -> list[Row]:
    return pq.read_table(file).to_pylist()


def _cell(row: Row) -> Cell:
    return row["arm"], row["rho"], row["flip_rate"]


def _slopes(file: Path) -> dict[Cell, Slope]:
    return {_cell(row): Slope(row["a"], row["b"], row["explained"]) for row in _read(file)}


def _curves(file: Path) -> dict[Cell, Curve]:
    found: dict[Cell, list[tuple[float, float]]] = {}
    for row in sorted(_read(file), key=lambda row: row["bin"]):
        found.setdefault(_cell(row), []).append((row["reward_margin"], row["gradient_weight"]))
    return {
        cell: (np.array([h for h, _ in points]), np.array([w for _, w in points])) for cell, points in found.items()
    }

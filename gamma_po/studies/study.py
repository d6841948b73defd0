"""What every protocol hands to the report: rows, comparisons, fits, checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gamma_po.studies.comparison import Difference, holm, paired, verdict
from gamma_po.studies.running import Cell, Row, Trace
from gamma_po.studies.slope import Slope


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """One comparison: an arm against another, by seed, in one cell."""

    arm: str
    against: str
    rho: float | None
    flip_rate: float
    metric: str
    difference: Difference
    verdict: str
    survives_holm: bool


@dataclass(frozen=True, kw_only=True)
class Study:
    """A finished study.

    Args:
        title: one line.
        config: resolved configuration, plain values.
        metrics: columns of the rows that are compared, the first of them in the figures.
        rows: one per run; `stage` says which part of the protocol it belongs to.
        pairings: all comparisons.
        slopes: matched-slope fits by cell of the fitted arm.
        tuned: per method, ρ and flip rate: the chosen configuration, what was tried, edges.
        traces: reward margins and gradient weights by cell.
        checks: what was checked, and whether it held.
        levels: further columns whose means are shown.
        scope: what the intervals hold for, where that is not said by the seeds alone.
    """

    title: str
    config: dict[str, Any]
    metrics: tuple[str, ...]
    rows: list[Row]
    pairings: list[Pairing]
    slopes: dict[Cell, Slope] = field(default_factory=dict)
    tuned: list[Row] = field(default_factory=list)
    traces: dict[Cell, Trace] = field(default_factory=dict)
    checks: list[tuple[str, bool]] = field(default_factory=list)
    levels: tuple[str, ...] = ()
    scope: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(held for _, held in self.checks)


def place(rho: float | None, flips: float) -> str:
    """Name a cell of the tables: the reference, where there are several, and the flip rate.

    >>> place(0.5, 0.4), place(None, 0.0)
    ('ρ 0.5, flips 0.4', 'flips 0')
    """
    return ("" if rho is None else f"ρ {rho:g}, ") + f"flips {flips:g}"


def by_cell(rows: Iterable[Row], metric: str) -> dict[Cell, dict[int, float]]:
    """Values by arm, ρ and flip rate, then by seed."""
    found: dict[Cell, dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["arm"], row["rho"], row["flip_rate"]][row["seed"]] = row[metric]
    return found


def compare(
    rows: Sequence[Row],
    against: dict[str, tuple[str, ...]],
    metrics: Sequence[str],
    margin: float,
    steps: Mapping[str, float] | None = None,
) -> list[Pairing]:
    """Compare every arm with each of its counterparts in every cell, by every metric.

    Seeds at which a metric does not exist for one of the two (a KL that cannot be reached) are left out of it.

    Args:
        rows: of the runs.
        against: arm -> the arms it is compared with.
        metrics: columns that should be large.
        margin: for `verdict`.
        steps: of metrics that are shares of few things; see `paired`.
    """
    raw: list[tuple[str, str, float | None, float, str, Difference]] = []
    for metric in metrics:
        cells = by_cell(rows, metric)
        for (arm, rho, flips), values in cells.items():
            for other in against.get(arm, ()):
                base = cells.get((other, rho, flips), {})
                seeds = [s for s in sorted(values) if s in base and values[s] == values[s] and base[s] == base[s]]
                if len(seeds) > 1:
                    step = (steps or {}).get(metric, 0.0)
                    difference = paired([values[s] for s in seeds], [base[s] for s in seeds], step)
                    raw.append((arm, other, rho, flips, metric, difference))
    survives = holm([item[-1].p for item in raw])
    names = ("arm", "against", "rho", "flip_rate", "metric", "difference")
    return [
        Pairing(**dict(zip(names, item, strict=True)), verdict=verdict(item[-1], margin), survives_holm=holds)
        for item, holds in zip(raw, survives, strict=True)
    ]


def common_checks(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """γ = 0 equals the base loss bit for bit; the reference has 50 % against itself (it stops the run otherwise)."""
    equal = [row["equal_to_base"] for row in rows if row["equal_to_base"] is not None]
    return [
        (f"γ = 0 ends with the base loss's weights, bit for bit, in {sum(equal)} of {len(equal)} runs", all(equal)),
        ("the reference wins exactly half against itself, with KL 0, in every world", True),
    ]


def oracle_check(rows: Sequence[Row], metric: str, base: str, oracle: str) -> list[tuple[str, bool]]:
    """Where 40 % or more of the labels are flipped, the oracle beats the base loss."""
    cells, found = by_cell(rows, metric), []
    for (arm, rho, flips), values in cells.items():
        if arm == oracle and flips >= 0.4 and len(values) > 1:
            base_values = cells[base, rho, flips]
            seeds = [s for s in sorted(values) if values[s] == values[s] and base_values[s] == base_values[s]]
            gain = paired([values[s] for s in seeds], [base_values[s] for s in seeds])
            text = f"{oracle} − {base}, {metric}, {place(rho, flips)}: {100 * gain.mean:+.1f} points"
            found.append((text, gain.low > 0))
    return found

"""What every protocol hands to the report: rows, comparisons, fits, checks."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gamma_po.studies.comparison import Difference, holm, paired, verdict
from gamma_po.studies.running import REFERENCE_TOLERANCE, Cell, Row, Trace
from gamma_po.studies.slope import Slope

COMPARED = ("arms", "control", "evaluation")  # stages of the rows that are compared; others tune or choose
Spot = tuple[float | None, float, str]  # ρ, flip rate, metric


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """One comparison: an arm against another, by seed, in one cell; not `known` with fewer than two common seeds."""

    arm: str
    against: str
    rho: float | None
    flip_rate: float
    metric: str
    difference: Difference
    verdict: str
    survives_holm: bool

    @property
    def known(self) -> bool:
        """Whether there is a difference at all."""
        return self.difference.count > 1


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

    Seeds at which a metric does not exist for one of the two (a KL that cannot be reached) are left out of it; with
    fewer than two left there is no difference, but the comparison is listed, and counted by Holm's correction.

    Args:
        rows: of the runs.
        against: arm -> the arms it is compared with.
        metrics: columns that should be large.
        margin: for `verdict`.
        steps: of metrics that are shares of few things; see `paired`.
    """
    raw: list[tuple[str, str, float | None, float, str, Difference]] = []
    steps = steps or {}
    for metric in metrics:
        cells = by_cell(rows, metric)
        for (arm, rho, flips), values in cells.items():
            for other in against.get(arm, ()):
                if base := cells.get((other, rho, flips)):  # an arm may be there at some flip rates only
                    difference = difference_of(values, base, steps.get(metric, 0.0))
                    raw.append((arm, other, rho, flips, metric, difference))
    survives = holm([item[-1].p for item in raw])
    names = ("arm", "against", "rho", "flip_rate", "metric", "difference")
    return [
        Pairing(**dict(zip(names, item, strict=True)), verdict=_verdict(item[-1], margin), survives_holm=holds)
        for item, holds in zip(raw, survives, strict=True)
    ]


def difference_of(values: Mapping[int, float], base: Mapping[int, float], step: float = 0.0) -> Difference:
    """Compare two arms on the seeds at which both have a number; NaN with fewer than two of them.

    >>> difference_of({0: 0.5, 1: math.nan, 2: 0.7}, {0: 0.4, 1: 0.5})
    Difference(mean=nan, low=nan, high=nan, p=1.0, count=1)
    """
    seeds = [seed for seed in sorted(values) if seed in base and not math.isnan(values[seed] + base[seed])]
    if len(seeds) < 2:
        return Difference(math.nan, math.nan, math.nan, 1.0, len(seeds))
    return paired([values[seed] for seed in seeds], [base[seed] for seed in seeds], step)


def _verdict(difference: Difference, margin: float) -> str:
    if difference.count < 2:
        return f"not compared: {difference.count} common seed{'' if difference.count == 1 else 's'}"
    return verdict(difference, margin)


def common_checks(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """γ = 0 equals the base loss bit for bit; the reference wins half against itself."""
    equal = [row["equal_to_base"] for row in rows if row["equal_to_base"] is not None]
    text = f"γ = 0 ends with the base loss's weights, bit for bit, in {sum(equal)} of {len(equal)} runs"
    return [(text, bool(equal) and all(equal)), *reference_check(rows)]


def reference_check(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """The reference has a win rate of half, and KL 0, against itself, as far as sums in float64 can tell."""
    seen = [row["reference_error"] for row in rows if row.get("reference_error") is not None]
    largest = f"at most {max(seen):.1g}" if seen else "nothing seen, not"
    text = f"the reference against itself: {largest} off a win rate of half and a KL of 0, in {len(seen)} runs"
    return [(text, bool(seen) and all(error <= REFERENCE_TOLERANCE for error in seen))]


def oracle_check(rows: Sequence[Row], metric: str, base: str, oracle: str) -> list[tuple[str, bool]]:
    """Where 40 % or more of the labels are flipped, the oracle beats the base loss: the interval lies above 0."""
    cells, found = by_cell(rows, metric), []
    for (arm, rho, flips), values in cells.items():
        if arm == oracle and flips >= 0.4 and len(values) > 1:
            gain = difference_of(values, cells.get((base, rho, flips), {}))
            found.append((f"{oracle} − {base}, {metric}, {place(rho, flips)}: {_points(gain)}", gain.low > 0))
    return found


def _points(gain: Difference) -> str:
    if gain.count < 2:
        return f"{gain.count} common seeds are too few"
    mean, low, high = (100 * value for value in gain[:3])
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] points"


def without_power(
    rows: Sequence[Row], metrics: Sequence[str], base: str, oracles: Collection[str], steps: Mapping[str, float]
) -> dict[Spot, str]:
    """Say by ρ, flip rate and metric where not even the oracle can be told from the base loss.

    Where leaving out all flipped pairs makes no visible difference, that another arm makes none says nothing of it.
    """
    gains: dict[Spot, list[Difference]] = defaultdict(list)
    for metric in metrics:
        cells = by_cell(rows, metric)
        for (arm, rho, flips), values in cells.items():
            if arm in oracles and flips > 0:  # without flips the oracle is the base loss
                gain = difference_of(values, cells.get((base, rho, flips), {}), steps.get(metric, 0.0))
                gains[rho, flips, metric].append(gain)
    return {
        (rho, flips, metric): f"No verdict at {place(rho, flips)} by {metric}: the oracle's gain over {base}, "
        f"{_points(own[0])}, cannot be told from 0, so the study has no power there to tell arms apart."
        for (rho, flips, metric), own in gains.items()
        if not any(gain.low > 0 for gain in own)
    }


def qualified(pairings: Iterable[Pairing], powerless: Mapping[Spot, str]) -> list[Pairing]:
    """Call nothing equivalent where the study has no power; see `without_power`."""
    return [
        dataclasses.replace(p, verdict=f"no verdict: {p.verdict}, and no power to tell")
        if (p.rho, p.flip_rate, p.metric) in powerless and p.verdict.startswith("equivalent")
        else p
        for p in pairings
    ]

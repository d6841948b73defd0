"""Paired comparisons: differences seed by seed, their intervals, and what may be concluded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, of no difference
    count: int


def paired(values: Sequence[float], baseline: Sequence[float], step: float = 0.0) -> Difference:
    """Compare two arms on the same seeds.

    Args:
        values: one per seed.
        baseline: the same seeds in the same order.
        step: between neighbouring values of the measure, 0 if it is continuous. A share of few prompts may differ
            by the same amount in all of few seeds by chance; two roundings, step² / 12 each, add to the variance.

    Raises:
        ValueError: fewer than two seeds.

    >>> difference = paired([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])
    >>> [round(x, 3) for x in difference]
    [0.2, -0.048, 0.448, 0.074, 3]
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError("an interval needs at least two seeds")
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    error = math.sqrt((variance + (step**2 / 6 if mean else 0)) / count)
    half = t_quantile(0.95, count - 1) * error
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    return Difference(mean, mean - half, mean + half, 1 - t_coverage(abs(mean) / error, count - 1), count)


def verdict(difference: Difference, margin: float) -> str:
    """Say what a difference shows: helps, hurts, equivalent within ±margin, or nothing.

    Args:
        difference: of a number that should be large.
        margin: the smallest difference of interest, in the same unit, > 0.

    >>> verdict(Difference(0.02, 0.015, 0.025, 0.0, 9), 0.01)
    'helps'
    >>> verdict(Difference(0.004, 0.002, 0.006, 0.0, 9), 0.01)
    'helps, by less than 0.01'
    >>> verdict(Difference(0.001, -0.002, 0.004, 0.4, 9), 0.01)
    'equivalent within ±0.01'
    >>> verdict(Difference(0.01, -0.01, 0.03, 0.3, 9), 0.01)
    'cannot tell'
    """
    small = f", by less than {margin:g}" if -margin < difference.low and difference.high < margin else ""
    if difference.low > 0:
        return "helps" + small
    if difference.high < 0:
        return "hurts" + small
    return f"equivalent within ±{margin:g}" if small else "cannot tell"


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which comparisons stay significant when all of them are counted (Holm's procedure).

    >>> holm([0.01, 0.04, 0.03])
    [True, False, False]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        found[index] = True
    return found


def t_coverage(t: float, freedom: int) -> float:
    """Return P(|T| <= t) of Student's t, t >= 0.

    Source:
        Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums for whole degrees of freedom.

    >>> round(t_coverage(2.262157, 9), 6), round(t_coverage(1.812461, 10), 6)
    (0.95, 0.9)
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):  # terms cos^(k-2)
        total += term
        term *= cosine**2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + sine * total)
    return sine * total


def t_quantile(coverage: float, freedom: int) -> float:
    """Return t with P(|T| <= t) = coverage, by bisection.

    >>> round(t_quantile(0.95, 19), 4)
    2.093
    """
    low, high = 0.0, 1.0
    while t_coverage(high, freedom) < coverage:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_coverage(middle, freedom) < coverage else (low, middle)
    return high

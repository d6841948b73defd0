"""Win rates from the annotations of a judge, as in AlpacaEval 2; the `alpaca-eval` package does the arithmetic."""

from __future__ import annotations

import importlib.util
from typing import Any

from gamma_po.data.sources import read_rows
from gamma_po.errors import ConfigError, DataError

NEEDED = ("preference", "output_1", "output_2", "generator_1", "generator_2")
PACKAGE = "alpaca_eval"
QUESTIONS = 805  # of AlpacaEval: the length-controlled rate reads the difficulty of each by its place in the list


def read_annotations(source: str) -> list[dict[str, Any]]:
    """Read the annotations that `alpaca_eval` writes: the baseline is output 1, the policy output 2.

    Raises:
        DataError: a column is missing, a preference is no number in [1, 2] (or 0, a draw), or several models are
            mixed.
    """
    rows = read_rows(source)
    for row in rows:
        missing = [name for name in NEEDED if name not in row.values]
        if missing:
            there = ", ".join(map(str, row.values))
            raise DataError(f"{row.location}: no column {missing[0]!r}; columns there: {there}")
        value = row.values["preference"]
        if value is not None and not (isinstance(value, int | float) and (value == 0 or 1 <= value <= 2)):
            allowed = "a number in [1, 2], 0 for a draw, or null"
            raise DataError(f"{row.location}: column 'preference' must hold {allowed}, found {value!r}")
    for name in ("generator_1", "generator_2"):
        found = sorted({str(row.values[name]) for row in rows})
        if len(found) > 1:
            raise DataError(f"{source}: column {name!r} names several models ({', '.join(found)}); one is allowed")
    return [row.values for row in rows]


def win_rates(annotations: list[dict[str, Any]]) -> dict[str, float]:
    """Return win rate, discrete win rate and length-controlled win rate of output 2, in percent.

    Args:
        annotations: of `read_annotations`, in AlpacaEval's order.

    Raises:
        ConfigError: the package is not installed, or the difficulties of the questions cannot be downloaded.
        DataError: these are not AlpacaEval's questions.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError("annotations need the package alpaca-eval: pip install alpaca-eval 'setuptools<81'")
    try:
        from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:  # alpaca-eval hides this function where a package that it needs is missing
        problem = f"alpaca-eval is installed, but not all that it needs: {error}"
        raise ConfigError(f"{problem}; pip install alpaca-eval 'setuptools<81'") from error
    if len(annotations) != QUESTIONS:
        raise DataError(
            f"{len(annotations)} annotations, and AlpacaEval has {QUESTIONS} questions, whose difficulties the "
            "length-controlled win rate needs"
        )
    try:
        rates = get_length_controlled_winrate(annotations, save_weights_dir=None)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"alpaca-eval could not download the difficulties of its questions: {reason}") from error
    return {name: float(value) for name, value in rates.items()}

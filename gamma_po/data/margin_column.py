"""The column of numbers that a margin reads: named where it is read and only there, with numbers that it can take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gamma_po.data.dataset import PairDataset
from gamma_po.data.formatting import Preference
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.margins.base import Margin


def check_is_read(margin: Margin, column: str | None) -> None:
    """Refuse a margin column that the margin would ignore.

    Args:
        margin: of the run.
        column: `data.columns.margin`.

    Raises:
        ConfigError: naming both.
    """
    if column is not None and not margin.reads_column:
        raise ConfigError(
            f"data.columns.margin={column!r} is not used: the margin {margin.name} "
            "does not read a data column; allowed with: column, or reverse and shuffled around it"
        )


def check_margin(margin: Margin, column: str | None, label_noise: float) -> None:
    """Refuse a margin that needs a column where none is named, and label noise where it takes no negative number.

    Args:
        margin: of the run.
        column: `data.columns.margin`.
        label_noise: rate, in [0, 1].

    Raises:
        ConfigError: there is no column, or noise would turn the sign of numbers whose logarithm is taken.
    """
    if margin.reads_column and column is None:
        raise ConfigError(
            f"data.columns.margin is not set; the margin {margin} needs it: a column with a number per pair"
        )
    refuses_negative = margin.check_column(torch.tensor([-1.0])) is not None
    allowed = (
        f"0 with the margin {margin}, as a flipped label turns the sign of the margin column, which must be > 0 "
        "under the logarithm; or column.transform=identity"
    )
    require(label_noise == 0 or not refuses_negative, "data.label_noise", label_noise, allowed)


def check_column(margin: Margin, dataset: PairDataset, preferences: Sequence[Preference]) -> None:
    """Refuse a row whose number the margin cannot take.

    Args:
        margin: of the run.
        dataset: N pairs.
        preferences: of the same pairs.

    Raises:
        DataError: names the row and its number.
    """
    column = dataset.labelled_column()
    row = None if column is None else margin.check_column(column)
    if column is None or row is None:
        return
    flipped = ", its sign turned by data.label_noise" if dataset.flipped[row] else ""
    raise DataError(
        f"{preferences[row].location}: the margin column gives {float(column[row]):g}{flipped}, "
        f"which the margin {margin} cannot take; allowed: finite numbers (32 bits), > 0 with "
        "column.transform=log"
    )

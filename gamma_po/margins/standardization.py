"""Location and scale of reference margins, by which they become z-scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gamma_po.errors import DataError, unknown_name
from gamma_po.state import float64

MAD_TO_STD = 1.4826  # the MAD of a normal distribution is its standard deviation divided by this


def median(x: Tensor) -> Tensor:
    """Return the median: the mean of the two middle values where their number is even (unlike torch.median).

    Args:
        x: [N], N >= 1.

    Returns:
        [], float64.

    >>> median(torch.tensor([4.0, 1.0, 3.0, 9.0])).item()
    3.5
    """
    values, count = float64(x).sort().values, x.numel()
    return (values[(count - 1) // 2] + values[count // 2]) / 2


def robust_scale(x: Tensor) -> Tensor:
    """Return 1.4826 · median |x - median x|, the standard deviation if x is normal.

    Args:
        x: [N], N >= 1.

    Returns:
        [], float64, >= 0.

    >>> robust_scale(torch.tensor([1.0, 2.0, 3.0, 4.0, 1000.0])).item()
    1.4826
    """
    return MAD_TO_STD * median((float64(x) - median(x)).abs())


def location_and_scale(margins: Tensor, standardize: Literal["raw", "z", "robust_z"]) -> tuple[Tensor, Tensor]:
    """Return the location and scale that turn margins into z = (margin - location) / scale.

    raw: 0 and 1; z: mean and (population) standard deviation; robust_z: median and 1.4826 MAD.

    Args:
        margins: [N], N >= 1, finite.
        standardize: which pair of statistics.

    Returns:
        Location and scale, [] each, float64, in the margins' units.

    Raises:
        ConfigError: unknown `standardize`.
        DataError: no margins, one that is not finite, or a scale of 0.

    >>> [round(v.item(), 4) for v in location_and_scale(torch.tensor([0.0, 1.0, 2.0, 50.0]), "robust_z")]
    [1.5, 1.4826]
    """
    if margins.ndim != 1 or margins.numel() == 0 or not torch.isfinite(margins).all():
        raise DataError(
            f"margins of shape {tuple(margins.shape)} have no statistics; "
            "allowed: one dimension, at least one margin, finite values"
        )
    values = float64(margins)
    if standardize == "raw":
        return values.new_zeros(()), values.new_ones(())
    if standardize == "z":
        return values.mean(), _positive(values.std(correction=0), values, "all margins are equal")
    if standardize == "robust_z":
        cause = "more than half of the margins equal their median (standardize 'z' or 'raw' may do)"
        return median(values), _positive(robust_scale(values), values, cause)
    raise unknown_name("standardize", standardize, ("raw", "z", "robust_z"))


def _positive(scale: Tensor, margins: Tensor, cause: str) -> Tensor:
    if not scale > 0:
        raise DataError(f"the scale of {margins.numel()} margins is 0, so they have no z-score: {cause}")
    return scale

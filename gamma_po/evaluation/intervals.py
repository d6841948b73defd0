"""Means with 95 % intervals that know that pairs of one prompt are not independent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959964


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def clustered_mean(values: Tensor, clusters: Tensor) -> Estimate:
    """Estimate a mean from values that come in clusters.

    The variance of the mean is that of a ratio estimator over clusters,
    `C/(C-1) Σ_c (Σ_{i in c} (x_i - mean))² / N²`; with one value per cluster it is the usual s²/N.

    Args:
        values: x, [N].
        clusters: [N], integers; equal for values of one prompt.

    Returns:
        Mean ± 1.96 standard errors; a zero-width interval where there is a single cluster.

    >>> str(clustered_mean(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])))
    '0.500 [-0.480, 1.480]'
    """
    values = values.double()
    mean = values.mean()
    _, member = torch.unique(clusters, return_inverse=True)
    count = int(member.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, member, values - mean)
    error = 0.0
    if count > 1:
        error = float((count / (count - 1) * sums.square().sum()).sqrt() / len(values))
    return Estimate(float(mean), float(mean) - Z95 * error, float(mean) + Z95 * error)

"""Means with 95 % intervals that know that pairs of one prompt are not independent."""

from __future__ import annotations

import math
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


def clustered_share(hits: Tensor, clusters: Tensor) -> Estimate:
    """Estimate a share from values in [0, 1] that come in clusters.

    Wilson's interval with the effective sample size p (1 - p) / Var(mean), Var as in `clustered_mean`, at most
    the number of values; where all values are equal, the number of clusters. It never leaves [0, 1] and never
    has zero width.

    Args:
        hits: 0, 1, or 1/2 for a tie, [N].
        clusters: [N], integers; equal for values of one prompt.

    Source:
        Wilson (1927); effective sample size as in Korn and Graubard (1998).

    >>> str(clustered_share(torch.ones(20), torch.arange(20)))
    '1.000 [0.839, 1.000]'
    """
    mean = clustered_mean(hits, clusters)
    variance = ((mean.high - mean.mean) / Z95) ** 2
    p, size = mean.mean, float(len(torch.unique(clusters)))
    if variance > 0 and 0 < p < 1:
        size = min(p * (1 - p) / variance, float(len(hits)))
    centre = (p + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 / (1 + Z95**2 / size) * math.sqrt(p * (1 - p) / size + Z95**2 / (4 * size**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


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

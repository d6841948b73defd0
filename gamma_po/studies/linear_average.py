"""The open challenge's bracket: the best that averaging can do which knows where gold rewards come from.

Gold rewards are drawn at random, so there is a best linear estimate of them from noisy labels. For a pair with gold
difference d, taken as Gaussian with variance v = Var d, the label y = ±1 has mean m(d) = (1-2ε) tanh(a d / 2), a the
label gap. Then (Stein) cov(y, g) = k cov(d, g), k = E m'(d), and to first order cov(y_i, y_j) = k_i k_j cov(d_i, d_j):

    ĝ(x) = Σ_i k_i cov(g(x), d_i) [(K + diag(1 - K_ii))^-1 y]_i,   K_ij = k_i k_j cov(d_i, d_j).

The covariances are those of `RandomFunction`, over random units. Nothing is tuned: prior and ε are told, which no
method for real data could be.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gamma_po.studies.bandit import RandomFunction

UNITS = 2000  # random units in place of the expectation over all
SEED = 123  # of these units; no world has it
NODES = 40  # of the quadrature


def linear_average(first: Tensor, second: Tensor, label: Tensor, x: Tensor, *, flip_rate: float, gap: float) -> Tensor:
    """Return the estimate ĝ(x), up to a constant, [B] float64.

    Args:
        first: features, [N, F].
        second: features, [N, F].
        label: 1 where `first` is preferred, else -1, [N].
        x: features of the responses to score, [B, F].
        flip_rate: ε.
        gap: labels before flips are Bradley-Terry on this many times the gold difference.
    """
    units = RandomFunction(x, UNITS, torch.Generator().manual_seed(SEED))
    scored = _terms(units, x)
    scale = scored.var(0).sum().rsqrt()  # gold has variance 1 over responses
    difference = (_terms(units, first) - _terms(units, second)) * scale
    variance = difference.square().sum(1)
    slope = (1 - 2 * flip_rate) * mean_slope(variance, gap)
    known = slope[:, None] * difference
    covariance = known @ known.T
    covariance.diagonal().fill_(1.0)
    return scored * scale @ (known.T @ torch.linalg.solve(covariance, label.double()))


def mean_slope(variance: Tensor, gap: float) -> Tensor:
    """Return E[d/dd tanh(gap d / 2)] for d ~ N(0, variance), by Gauss-Hermite quadrature.

    >>> mean_slope(torch.tensor([0.0, 1.0]), 2.0)
    tensor([1.0000, 0.6057], dtype=torch.float64)
    """
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(NODES))
    d = variance.double().sqrt()[..., None] * nodes
    return (gap / 2 / torch.cosh(gap * d / 2).square()) @ weights / math.sqrt(2 * math.pi)


def _terms(units: RandomFunction, x: Tensor) -> Tensor:
    return torch.tanh(x @ units.weight + units.bias).double()

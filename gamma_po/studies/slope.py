"""The matched-slope control: how much of a dynamic margin is only another temperature and a constant margin?

A fixed-margin logistic loss pulls with s(a - b h). Fitted to the pulls of a dynamic method, it is the base loss
at β b with margin a: same pull for the same confidence on average, and nothing per pair.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import Loss
from gamma_po.margins import Fixed
from gamma_po.studies.settings import Setting

NEWTON_STEPS = 50
CONVERGED = 1e-9
SMALLEST_PULL = 1e-6
RIDGE = 1e-14  # keeps the step finite where all pulls are 0 or 1


class Slope(NamedTuple):
    """The fit s(a - b h), and the share of the pulls' variance that it explains."""

    a: float
    b: float
    explained: float

    @property
    def has_control(self) -> bool:
        """Whether some β has this slope: pulls must fall with h."""
        return self.b > 0


def fit_slope(reward_margin: Tensor, weight: Tensor) -> Slope:
    """Fit s(a - b h) to gradient weights: logistic regression with weights as targets, by Newton's method.

    Args:
        reward_margin: h, [N], reward units.
        weight: [N], in [0, 1].

    >>> h = torch.linspace(-3, 3, 50)
    >>> [round(x, 4) for x in fit_slope(h, torch.sigmoid(0.5 - 2 * h))]
    [0.5, 2.0, 1.0]
    """
    h, target = reward_margin.double(), weight.double()
    scale = h.std().clamp_min(torch.finfo(torch.float64).tiny)
    design = torch.stack([torch.ones_like(h), (h - h.mean()) / scale], dim=1)
    start = target.mean().clamp(SMALLEST_PULL, 1 - SMALLEST_PULL).logit()
    coefficients = _logistic_fit(design, target, torch.stack([start, torch.zeros_like(start)]))
    residual = target - torch.sigmoid(design @ coefficients)
    explained = 1 - residual.square().mean() / target.var(correction=0)
    level, slope = coefficients
    return Slope(float(level - slope * h.mean() / scale), float(-slope / scale), float(explained))


def _logistic_fit(design: Tensor, target: Tensor, coefficients: Tensor) -> Tensor:
    """Minimise the mean cross-entropy by Newton's method, halving steps that do not lower it."""

    def loss(at: Tensor) -> Tensor:
        x = design @ at
        return (torch.logaddexp(x, torch.zeros_like(x)) - target * x).mean()

    ridge = RIDGE * torch.eye(2, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(design @ coefficients)
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(target) + ridge
        change = torch.linalg.solve(curvature, design.T @ (target - p) / len(target))
        before = loss(coefficients)
        while loss(coefficients + change) > before and change.abs().max() > CONVERGED:
            change = change / 2
        coefficients = coefficients + change
        if change.abs().max() <= CONVERGED:
            break
    return coefficients


def matched(setting: Setting, slope: Slope, arm: str) -> Setting:
    """Return the control: the same loss at β b with the fixed margin a.

    Raises:
        ConfigError: the slope is not positive, so that no β matches it.
    """
    if not slope.has_control:
        raise ConfigError(f"{arm}: the fitted slope b={slope.b:.3g} is not positive; no β matches it")
    return dataclasses.replace(
        setting, arm=arm, loss=with_beta(setting.loss, setting.loss.beta * slope.b), margin=Fixed(gamma=slope.a)
    )


def with_beta(loss: Loss, beta: float) -> Loss:
    """Return the loss with another β."""
    return dataclasses.replace(loss, beta=beta)  # type: ignore[type-var]

"""The problem that KL margins solve, the conditions of its optimum, and how far a result is from meeting them.

min_q mean_i [softplus(γ0 q_i - h_i) + τ q_i log q_i] over q >= 0 with mean q = 1. With c = γ0/τ, x_i = log q_i and
γ_i = γ0 q_i, the optimum is the only point where

    x_i + c s(γ0 exp(x_i) - h_i) = μ  for every i,    mean_i exp(x_i) = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.state import float64

RESIDUAL_TOLERANCE = 1e-11  # reward units, beside what rounding alone can leave
EPSILON = torch.finfo(torch.float64).eps


@torch.no_grad()
def kkt_residual(target_margin: Tensor, reward_margin: Tensor, *, gamma0: float, tau: float) -> Tensor:
    """Return how far target margins are from optimal, in reward units.

    The larger of |mean γ - γ0| and max_i |γ_i - γ0 exp(μ - c s(γ_i - h_i))| / (1 + c γ_i s'(γ_i - h_i)),
    with the multiplier μ that fits best; zero only at the solution.

    Args:
        target_margin: γ, [N] or [N, ...], >= 0, reward units.
        reward_margin: h, shape of γ, reward units.
        gamma0: γ0, > 0.
        tau: τ, > 0.

    Returns:
        [] or [...], one number per pool, float64, >= 0.

    >>> kkt_residual(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), gamma0=1.0, tau=1.0).item()
    0.0
    """
    c = strength(gamma0, tau)
    margin, h = float64(target_margin), float64(reward_margin)
    p = torch.sigmoid(margin - h)
    slope = 1 + c * margin * p * torch.sigmoid(h - margin)
    weight = margin / slope
    mu = (torch.xlogy(weight, margin / gamma0) + weight * c * p).sum(0) / weight.sum(0)
    worst = ((margin - gamma0 * torch.exp(mu - c * p)) / slope).abs().amax(0)
    return torch.maximum(worst, (margin.mean(0) - gamma0).abs())


def strength(gamma0: float, tau: float) -> float:
    """Validate the two options and return c = γ0/τ."""
    for name, value in (("gamma0", gamma0), ("tau", tau)):
        require(math.isfinite(value) and value > 0, name, value, "a finite number > 0")
    return gamma0 / tau


def stationarity(x: Tensor, mu: Tensor, h: Tensor, gamma0: float, c: float) -> tuple[Tensor, Tensor]:
    """Return the residual x + c s(γ - h) - μ of every pair and its derivative in x, which is at least 1."""
    margin = gamma0 * x.exp()
    p = torch.sigmoid(margin - h)
    return (x - mu) + c * p, 1 + c * margin * p * torch.sigmoid(h - margin)


def allowed_residual(margin: Tensor, h: Tensor, c: float) -> Tensor:
    """Return the residual up to which γ counts as optimal, one number per pool."""
    rounding = 4 * EPSILON * (h.abs().amax(0) + max(1.0, c) * margin.amax(0))
    return RESIDUAL_TOLERANCE + rounding


def require_solved(margin: Tensor, h: Tensor, gamma0: float, tau: float) -> None:
    """Raise an ArithmeticError unless every pool meets the optimality conditions."""
    residual = kkt_residual(margin, h, gamma0=gamma0, tau=tau)
    allowed = allowed_residual(margin, h, gamma0 / tau)
    if not (residual <= allowed).all():
        worst = (residual - allowed).nan_to_num(nan=float("inf")).argmax()
        raise ArithmeticError(
            f"the KL margins of {h.shape[0]} pairs did not converge: residual {residual.flatten()[worst].item():.3g}, "
            f"allowed {allowed.flatten()[worst].item():.3g} reward units; gamma0={gamma0}, tau={tau}, "
            f"reward margins from {h.min().item():.6g} to {h.max().item():.6g}"
        )

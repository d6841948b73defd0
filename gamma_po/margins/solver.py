"""The KL margin: one convex allocation problem over a pool of N pairs, solved exactly.

The optimum is the only point that meets the conditions of `optimality`, with one scalar multiplier μ = c s(ν) for
the whole pool. For a given ν each equation has one root, between γ_i = γ0 and γ_i = h_i + ν; the mean of the roots
increases with ν. For c <= 2 a joint Newton iteration on (x, μ) normally needs five vectorised steps; otherwise nested
bracketed Newton finds ν and the same joint steps polish. Every result passes one check of the optimality conditions
before it is returned.

All of this is done on the CPU: pools are small and the iterations decide at every step, so that an accelerator is
waited for once, when its reward margins are fetched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gamma_po.errors import DataError
from gamma_po.margins.optimality import (
    EPSILON,
    allowed_residual,
    kkt_residual,
    require_solved,
    stationarity,
    strength,
)
from gamma_po.state import float64

JOINT_NEWTON_LIMIT = 2.0  # largest γ0/τ that starts with the joint iteration
JOINT_STEPS = 6
POLISH_STEPS = 3
BRACKETED_STEPS = 100  # bound on the steps of each of the two nested iterations
STEP_TOLERANCE = 1e-9  # a Newton step this short is taken and is the last: its error is the square of this
SEARCH_TOLERANCE = 1e-6  # the same while ν is searched for, where the joint iteration follows
POOL_TOLERANCE = 1e-5  # where the search for ν stops, in units of γ0: within reach of the joint iteration


@torch.no_grad()
def solve_kl_margins(reward_margin: Tensor, *, gamma0: float, tau: float) -> Tensor:
    """Return the exact KL target margins of a pool of pairs.

    γ = γ0 q, where q minimises mean_i [softplus(γ0 q_i - h_i) + τ q_i log q_i] over q >= 0 with mean q = 1.
    Solved in float64 on the CPU: a device that holds the pool is waited for once.

    Args:
        reward_margin: h, [N], N >= 1, finite, reward units; or [N, ...], many pools of N pairs side by side, each
            along the first dimension and solved as if it were alone.
        gamma0: γ0, mean of the margins, > 0, reward units.
        tau: τ, strength of the KL term, > 0, reward units; max γ / min γ <= exp(γ0/τ).

    Returns:
        γ, shape of h, reward units, detached; float64 for a float64 input, else float32.

    Raises:
        ConfigError: If `gamma0` or `tau` is not a positive finite number.
        DataError: If the pool is empty, not floating or not finite.
        ArithmeticError: If the result misses the optimality conditions, or float64 cannot hold the problem.

    Source: γ-PO, arXiv 2506.03690 (the optimisation problem of its algorithm).

    >>> solve_kl_margins(torch.tensor([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    tensor([0.7266, 0.8439, 1.4296])
    """
    c = strength(gamma0, tau)
    _require_pool(reward_margin)
    h = fetched(reward_margin)
    finite = torch.isfinite(h).all()
    joint = solved = None
    if c <= JOINT_NEWTON_LIMIT:
        start = torch.zeros_like(h)
        mu = c * torch.sigmoid(gamma0 - h).mean(0)
        joint = gamma0 * _joint_newton(h, start, mu, gamma0, c, JOINT_STEPS).exp()
        solved = kkt_residual(joint, h, gamma0=gamma0, tau=tau) <= allowed_residual(joint, h, c)
        if finite & solved.all():
            return returned(joint, reward_margin)
    if not finite:
        raise DataError(_describe_non_finite(h))
    x, mu = _nested_newton(h, gamma0, c)
    margin = gamma0 * _joint_newton(h, x, mu, gamma0, c, POLISH_STEPS).exp()
    if joint is not None and solved is not None:
        margin = torch.where(solved, joint, margin)
    require_solved(margin, h, gamma0, tau)
    return returned(margin, reward_margin)


@torch.no_grad()
def priced_kl_margins(reward_margin: Tensor, mu: Tensor, *, gamma0: float, tau: float) -> tuple[Tensor, Tensor]:
    """Return the margins that each pair takes at a given price, and how they answer to it.

    Solves log(γ_i/γ0) = μ - (γ0/τ) s(γ_i - h_i) for every pair alone; the price at which mean γ = γ0 is the
    exact solution's.

    Args:
        reward_margin: h, [N], finite, reward units.
        mu: μ, [], in [0, γ0/τ].
        gamma0: γ0, > 0.
        tau: τ, > 0.

    Returns:
        γ and dγ/dμ, [N] each, float64, on the pool's device, which is waited for once or twice.

    Raises:
        ArithmeticError: the iteration did not converge.

    >>> priced_kl_margins(torch.zeros(1), torch.tensor(0.5), gamma0=1.0, tau=1e9)[0]
    tensor([1.6487], dtype=torch.float64)
    """
    c = strength(gamma0, tau)
    h, mu = fetched(reward_margin), fetched(mu)
    x = torch.zeros_like(h)
    lo, hi, last = x + (mu - c), x + mu, torch.full_like(h, 2 * c)
    for _ in range(BRACKETED_STEPS):
        residual, slope = stationarity(x.clamp(lo, hi), mu, h, gamma0, c)
        newton = residual / slope
        done = newton.abs() <= max(STEP_TOLERANCE, 16 * EPSILON * c)
        x, lo, hi, last = _bracketed_step(x.clamp(lo, hi), residual, newton, lo, hi, last, done)
        if done.all():
            break
    else:
        raise ArithmeticError(f"γ at the price μ = {float(mu):.6g} was not found in {BRACKETED_STEPS} steps")
    margin = gamma0 * x.exp()
    slope = margin / stationarity(x, mu, h, gamma0, c)[1]
    return margin.to(reward_margin.device), slope.to(reward_margin.device)


@torch.no_grad()
def kl_value(reward_margin: Tensor, *, gamma0: float, tau: float) -> Tensor:
    """Return the optimal value of the allocation problem.

    V(h) = min_q mean_i [softplus(γ0 q_i - h_i) + τ q_i log q_i]; convex in h, dV/dh_i = -s(γ_i - h_i) / N.

    Args:
        reward_margin: h, [N], reward units.
        gamma0: γ0, > 0.
        tau: τ, > 0.

    Returns:
        [], float64, nats; no gradient.

    >>> round(kl_value(torch.tensor([1.0, 1.0]), gamma0=1.0, tau=1.0).item(), 6)
    0.693147
    """
    h = float64(reward_margin)
    margin = solve_kl_margins(h, gamma0=gamma0, tau=tau)
    q = margin / gamma0
    return (torch.logaddexp(margin - h, torch.zeros_like(h)) + tau * torch.xlogy(q, q)).mean()


def _joint_newton(h: Tensor, x: Tensor, mu: Tensor, gamma0: float, c: float, steps: int) -> Tensor:
    """Take Newton steps on all N + 1 equations at once; x stays in [μ - c, μ], where the root is."""
    for _ in range(steps):
        residual, slope = stationarity(x, mu, h, gamma0, c)
        weight = torch.softmax(x, 0)
        change = ((weight * residual / slope).sum(0) - log_mean_exp(x)) / (weight / slope).sum(0)
        mu = mu + change
        x = torch.clamp(x + (change - residual) / slope, mu - c, mu)
    return x - log_mean_exp(x)


def _nested_newton(h: Tensor, gamma0: float, c: float) -> tuple[Tensor, Tensor]:
    """Search ν in [γ0 - max h, γ0 - min h] such that mean γ(ν) = γ0; return x and μ close to the solution."""
    lo, hi = gamma0 - h.amax(0), gamma0 - h.amin(0)
    nu = (gamma0 - h.mean(0)).clamp(lo, hi)
    x, last = torch.zeros_like(h), 2 * (hi - lo)
    for _ in range(BRACKETED_STEPS):
        x = _invert_stationarity(x, nu, h, gamma0, c)
        mu = c * torch.sigmoid(nu)
        _, slope = stationarity(x, mu, h, gamma0, c)
        rate = mu * torch.sigmoid(-nu) / slope  # dx_i/dν
        reach, excess = x.exp() * rate, x.exp().mean(0) - 1  # dq_i/dν
        newton = excess / reach.mean(0)
        done = (newton.abs() * reach.amax(0) <= POOL_TOLERANCE) | (hi - lo <= EPSILON * (1 + nu.abs()))
        if done.all():
            break
        step, lo, hi, last = _bracketed_step(nu, excess, newton, lo, hi, last, done)
        step = torch.where(done, nu, step)  # pools that are done wait for the others
        x, nu = x + rate * (step - nu), step
    return x, mu


def _invert_stationarity(x: Tensor, nu: Tensor, h: Tensor, gamma0: float, c: float) -> Tensor:
    """Solve x + c s(γ0 exp(x) - h) = c s(ν) for every pair, starting from `x`."""
    mu = c * torch.sigmoid(nu)
    level = torch.log((h + nu).clamp_min(0) / gamma0).clamp(mu - c, mu)  # γ lies between γ0 and h + ν
    lo, hi = level.clamp_max(0), level.clamp_min(0)
    x, last = torch.clamp(x, lo, hi), 2 * (hi - lo)
    tolerance = max(SEARCH_TOLERANCE, 16 * EPSILON * c)
    for _ in range(BRACKETED_STEPS):
        residual, slope = stationarity(x, mu, h, gamma0, c)
        newton = residual / slope
        done = newton.abs() * (1 + gamma0 * x.exp()) <= tolerance
        x, lo, hi, last = _bracketed_step(x, residual, newton, lo, hi, last, done)
        if done.all():
            break
    return x


def _bracketed_step(
    x: Tensor, value: Tensor, newton: Tensor, lo: Tensor, hi: Tensor, last: Tensor, done: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take the Newton step of an increasing function, or bisect where it is no progress.

    Bisected are entries whose step leaves the bracket or is longer than half the `last` one, which makes the
    rate geometric; but a converged entry (`done`) never: rounding can put its step just outside a one-sided
    bracket, and bisection would then throw it far from the root it had reached.
    """
    lo, hi = torch.where(value < 0, x, lo), torch.where(value > 0, x, hi)
    target, size = x - newton, newton.abs()
    keep = done | ((target >= lo) & (target <= hi) & (2 * size <= last))
    return torch.where(keep, target, (lo + hi) / 2), lo, hi, torch.where(keep, size, hi - lo)


def log_mean_exp(x: Tensor) -> Tensor:
    """Return log mean_i exp(x_i) along the first dimension."""
    return torch.logsumexp(x, 0) - math.log(x.shape[0])


def _require_pool(reward_margin: Tensor) -> None:
    if reward_margin.ndim == 0 or reward_margin.numel() == 0 or not reward_margin.is_floating_point():
        raise DataError(
            f"reward margins have shape {tuple(reward_margin.shape)} and type {reward_margin.dtype}; "
            "allowed: at least one pair, floating point, pairs along the first dimension"
        )


def fetched(values: Tensor) -> Tensor:
    """Return the values on the CPU, in float64: the one wait for their device."""
    return values.detach().cpu().double()


def _describe_non_finite(h: Tensor) -> str:
    first = (~torch.isfinite(h)).nonzero()[0]
    return f"reward margin {h[tuple(first)].item()} of pair {int(first[0])} in a pool of {h.shape[0]} is not finite"


def returned(margin: Tensor, reward_margin: Tensor) -> Tensor:
    """Return γ to the pool's device: float64 for float64 reward margins, else float32."""
    dtype = torch.float64 if reward_margin.dtype == torch.float64 else torch.float32
    return margin.to(dtype).to(reward_margin.device, non_blocking=True)

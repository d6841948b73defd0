"""Mirror descent on the KL margin's problem, as the authors of γ-PO solve it: for reproduction."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gamma_po.errors import require_integer
from gamma_po.margins.solver import fetched, log_mean_exp, returned, solve_kl_margins

MIRROR_TOLERANCE = 1e-3  # mirror descent that is further from the exact solution warns, in units of γ0


@torch.no_grad()
def mirror_descent_margins(reward_margin: Tensor, *, gamma0: float, tau: float, steps: int = 20) -> Tensor:
    """Return the KL target margins as the authors' solver approximates them (for reproduction).

    p <- p exp(-η (τ (1 + log(N p)) + γ0 s(γ0 N p - h))), normalised, with η = min(0.5/τ, 1), from uniform p.
    γ = γ0 N p is read before the last update, so `steps - 1` updates count. The exact solution is found beside it:
    a γ that is more than 0.001 γ0 from it is warned of.

    Args:
        reward_margin: h, [N], N >= 1, finite, reward units.
        gamma0: γ0, > 0, reward units.
        tau: τ, > 0, reward units.
        steps: number of updates, >= 1, the last of them without effect.

    Returns:
        γ, [N], reward units, detached; float64 for a float64 input, else float32.

    Raises:
        ConfigError: If an option is out of range.
        DataError: As for `solve_kl_margins`.

    Source: γ-PO, arXiv 2506.03690, the authors' implementation.

    >>> mirror_descent_margins(torch.tensor([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    tensor([0.7266, 0.8439, 1.4296])
    """
    require_integer("steps", steps, at_least=1)
    h = fetched(reward_margin)
    exact = solve_kl_margins(h, gamma0=gamma0, tau=tau)
    rate = min(0.5 / tau, 1.0)
    x = torch.zeros_like(h)
    for _ in range(steps - 1):
        x = x - rate * (tau * (1 + x) + gamma0 * torch.sigmoid(gamma0 * x.exp() - h))
        x = x - log_mean_exp(x)
    margin = gamma0 * x.exp()
    _warn_if_far(margin, exact, h, gamma0, tau, steps)
    return returned(margin, reward_margin)


def _warn_if_far(margin: Tensor, exact: Tensor, h: Tensor, gamma0: float, tau: float, steps: int) -> None:
    """Warn where mirror descent has missed the exact solution, and say why."""
    error = (margin - exact).abs().amax().item() / gamma0
    if error <= MIRROR_TOLERANCE:
        return
    curvature = torch.sigmoid(exact - h) * torch.sigmoid(h - exact)
    stiffness = (gamma0 * exact * curvature / tau).max().item()
    limit = 3.0 if tau >= 0.5 else (2 - tau) / tau
    term = "gamma0 · γ · s'(γ - h) / tau"
    if stiffness > limit:
        problem = f"oscillates: {term} reaches {stiffness:.3g}, above {limit:.3g}"
    elif tau < 0.5:
        problem = f"is far from converged after {steps} steps: it needs tau >= 0.5"
    else:
        problem = f"has not converged after {steps} steps: {term} reaches {stiffness:.3g}, and it oscillates above 3"
    warnings.warn(
        f"mirror descent {problem} (gamma0={gamma0}, tau={tau}); a γ is {error:.2g} gamma0 from the exact one of "
        "solve_kl_margins",
        stacklevel=3,
    )

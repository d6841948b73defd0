"""Statistics and histograms of margins: pure functions of per-pair tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONSTANT_RANGE = 4 * torch.finfo(torch.float32).eps


class Histogram(NamedTuple):
    """Counts of values: bin k holds edges[k] <= value < edges[k + 1], the last bin also its upper end."""

    counts: Tensor  # [B] int64
    edges: Tensor  # [B + 1] float64, increasing


def margin_statistics(
    target_margin: Tensor, reward_margin: Tensor, gradient_weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what there is to know about the target margins of a set of pairs.

    mean, std (population: one pair has 0), min, max, the percentiles p10, p50, p90 (linear between order
    statistics), and corr, the correlation of γ with the reward margin. A NaN among the values makes the
    statistics it enters NaN.

    Args:
        target_margin: [P], P >= 1, γ in reward units. Valid pairs only.
        reward_margin: [P], h in reward units.
        gradient_weight: [P], how hard each pair pulls; its mean is added as `gradient_weight`.

    Returns:
        Float64 scalars by name.

    Raises:
        ValueError: no pairs, or tensors of different shapes.

    >>> statistics = margin_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    >>> [round(float(statistics[name]), 2) for name in ("mean", "p50", "max", "corr")]
    [2.0, 2.0, 3.0, 1.0]
    """
    _require_pairs(target_margin, reward_margin, gradient_weight)
    gamma = target_margin.detach().double()
    p10, p50, p90 = torch.quantile(gamma, gamma.new_tensor([0.1, 0.5, 0.9]))
    statistics = {
        "mean": gamma.mean(),
        "std": gamma.std(correction=0),
        "min": gamma.min(),
        "max": gamma.max(),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "corr": correlation(gamma, reward_margin),
    }
    if gradient_weight is not None:
        statistics["gradient_weight"] = gradient_weight.detach().double().mean()
    return statistics


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's correlation, and 0 where either side is constant.

    `mean(x y) / sqrt(mean(x²) mean(y²))` of the centred values. Constant means a range of at most 4 float32
    roundings of the largest value: what arithmetic leaves of a constant correlates with nothing.

    Args:
        first: [P], P >= 1.
        second: [P].

    Returns:
        [], float64, in [-1, 1].

    >>> float(correlation(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])))
    0.0
    """
    x, y = first.detach().double(), second.detach().double()
    if _is_constant(x) or _is_constant(y):
        return x.new_zeros(())
    x, y = x - x.mean(), y - y.mean()
    return ((x / x.norm()) @ (y / y.norm())).clamp(-1.0, 1.0)


def histogram(values: Tensor, *, bins: int = 40, limits: tuple[float, float] | None = None) -> Histogram:
    """Count values in bins of equal width.

    Values outside the limits, and values that are not finite, are in no bin. Limits of zero width become ±0.5
    around the value.

    Args:
        values: any shape, any float dtype.
        bins: number of bins, >= 1.
        limits: lower and upper end; None takes the smallest and largest finite value, (0, 0) without any.

    Returns:
        Counts and edges on the CPU.

    Raises:
        ValueError: fewer than one bin, or limits that are not finite and ordered.

    >>> counts, edges = histogram(torch.tensor([0.0, 0.1, 0.9, 1.0]), bins=2)
    >>> counts.tolist(), edges.tolist()
    ([2, 2], [0.0, 0.5, 1.0])
    """
    if bins < 1:
        raise ValueError(f"a histogram needs at least one bin, got bins={bins}")
    flat = values.detach().double().flatten().cpu()
    flat = flat[flat.isfinite()]
    low, high = _limits(flat) if limits is None else limits
    if not (float("-inf") < low <= high < float("inf")):
        raise ValueError(f"limits must be finite and ordered, got {limits}")
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    inside = flat[(flat >= low) & (flat <= high)]
    bin_of = (torch.searchsorted(edges, inside, right=True) - 1).clamp(0, bins - 1)
    return Histogram(torch.bincount(bin_of, minlength=bins), edges)


def _require_pairs(target_margin: Tensor, reward_margin: Tensor, gradient_weight: Tensor | None) -> None:
    shapes = [tuple(t.shape) for t in (target_margin, reward_margin, gradient_weight) if t is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"margin statistics need tensors of one shape [P] with P >= 1, got {shapes}")


def _is_constant(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= CONSTANT_RANGE * values.abs().max())


def _limits(finite: Tensor) -> tuple[float, float]:
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)

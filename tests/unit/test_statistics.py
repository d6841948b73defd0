"""Margin statistics and histograms against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gamma_po.statistics import correlation, histogram, margin_statistics

EXACT = 1e-12
finite = st.floats(-50, 50, width=32)
nonzero = st.floats(0.1, 10) | st.floats(-10, -0.1)


def random_pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reward_margin = random.standard_t(3, size=count)
    return (
        1 + np.tanh(reward_margin) + 0.3 * random.normal(size=count),
        reward_margin,
        random.uniform(size=count),
    )


@pytest.mark.parametrize("count", [2, 3, 10, 1001])
def test_margin_statistics_are_numpys(count: int) -> None:
    gamma, reward_margin, weight = random_pairs(count, seed=count)
    expected = {
        "mean": np.mean(gamma),
        "std": np.std(gamma),
        "min": np.min(gamma),
        "max": np.max(gamma),
        "p10": np.percentile(gamma, 10),
        "p50": np.median(gamma),
        "p90": np.percentile(gamma, 90),
        "corr": np.corrcoef(gamma, reward_margin)[0, 1],
        "gradient_weight": np.mean(weight),
    }
    found = margin_statistics(*(torch.tensor(values) for values in (gamma, reward_margin, weight)))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, abs=EXACT)
    assert all(value.shape == () and value.dtype == torch.float64 for value in found.values())


def test_one_pair_has_its_value_everywhere_and_no_spread() -> None:
    found = margin_statistics(torch.tensor([0.7]), torch.tensor([-2.0]))
    assert {found[name].item() for name in ("mean", "min", "max", "p10", "p50", "p90")} == {torch.tensor(0.7).item()}
    assert found["std"] == 0 and found["corr"] == 0
    assert "gradient_weight" not in found


def test_low_precision_values_are_summed_in_float64() -> None:
    gamma = torch.full((4096,), 1.0078125, dtype=torch.bfloat16)  # one bf16 rounding above 1; exact in binary
    assert margin_statistics(gamma, gamma)["mean"].item() == 1.0078125


def test_statistics_carry_no_gradient() -> None:
    gamma = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not any(value.requires_grad for value in margin_statistics(gamma, gamma, gamma).values())


def test_a_nan_margin_is_visible_in_the_statistics() -> None:
    found = margin_statistics(torch.tensor([1.0, float("nan")]), torch.tensor([0.0, 1.0]))
    assert all(found[name].isnan() for name in ("mean", "std", "min", "max", "p10", "p50", "p90", "corr"))


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_anything_but_two_equally_long_vectors_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \[P\] with P >= 1"):
        margin_statistics(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@given(st.lists(finite, min_size=2, max_size=20), nonzero, finite)
def test_correlation_with_an_affine_map_is_the_sign_of_its_slope(
    values: list[float], slope: float, shift: float
) -> None:
    first = torch.tensor(values, dtype=torch.float64)
    if first.max() - first.min() < 1e-3:
        return
    assert correlation(first, slope * first + shift).item() == pytest.approx(np.sign(slope), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -7.3])
def test_rounding_noise_on_a_constant_correlates_with_nothing(value: float) -> None:
    signal = torch.linspace(-1, 1, 101)
    constant = torch.full((101,), value)
    noisy = torch.where(signal > 0, torch.nextafter(constant, 2 * constant), constant)
    assert correlation(noisy, signal) == 0 and correlation(signal, noisy) == 0


@given(st.lists(finite, min_size=1, max_size=50), st.integers(1, 12))
def test_histogram_counts_like_numpy(values: list[float], bins: int) -> None:
    found = histogram(torch.tensor(values), bins=bins)
    _, edges = np.histogram(np.array(values), bins=bins)
    counts, _ = np.histogram(np.array(values), bins=found.edges.numpy())
    np.testing.assert_allclose(found.edges.numpy(), edges, rtol=0, atol=1e-10)
    assert found.counts.tolist() == counts.tolist()


@given(st.lists(finite, max_size=50))
def test_values_outside_the_limits_are_in_no_bin(values: list[float]) -> None:
    counts, edges = histogram(torch.tensor(values), bins=5, limits=(-1.0, 4.0))
    assert edges.tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert counts.tolist() == np.histogram(values, bins=5, range=(-1.0, 4.0))[0].tolist()


def test_values_that_are_not_finite_are_in_no_bin() -> None:
    values = torch.tensor([0.0, float("nan"), 2.0, float("inf"), float("-inf")])
    counts, edges = histogram(values, bins=2)
    assert counts.tolist() == [1, 1] and edges.tolist() == [0.0, 1.0, 2.0]


def test_a_histogram_of_nothing_is_empty() -> None:
    counts, edges = histogram(torch.empty(0), bins=4)
    assert counts.tolist() == [0] * 4 and edges[0] == -0.5 and edges[-1] == 0.5


@pytest.mark.parametrize(
    "options",
    [{"bins": 0}, {"limits": (1.0, 0.0)}, {"limits": (0.0, float("inf"))}, {"limits": (float("nan"), 1.0)}],
)
def test_impossible_bins_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"at least one bin|finite and ordered"):
        histogram(torch.zeros(3), **options)

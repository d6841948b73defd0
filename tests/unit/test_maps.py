"""Map shapes at points worked out by hand, their common laws, and the statistics behind z."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

from gamma_po.errors import ConfigError, DataError
from gamma_po.margins.maps import (
    ClippedLinear,
    Exp,
    Linear,
    MapShape,
    Piecewise,
    Power,
    Quantile,
    Sigmoid,
    Softplus,
)
from gamma_po.margins.standardization import location_and_scale, median, robust_scale

SHAPES = [Linear, ClippedLinear, Piecewise, Softplus, Sigmoid, Power, Exp, Quantile]
OPTIONS = {shape: [field.name for field in dataclasses.fields(shape)] for shape in SHAPES}
FROM_ZERO = [shape for shape in SHAPES if shape not in (Linear, Quantile)]

BY_HAND = [
    (Linear(g0=1.0, k=0.5), {-4.0: -1.0, 0.0: 1.0, 3.0: 2.5}),
    (ClippedLinear(gmax=3.0, low=-1.0, high=2.0), {-5.0: 0.0, -1.0: 0.0, 0.0: 1.0, 2.0: 3.0, 9.0: 3.0}),
    (Piecewise(k1=0.1, k2=0.5, t0=0.0, t1=1.0), {-2.0: 0.0, 0.5: 0.05, 1.0: 0.1, 2.0: 0.6, 3.0: 1.1}),
    (Piecewise(k1=0.2, k2=0.2, t0=1.0, t1=1.0), {0.0: 0.0, 1.0: 0.0, 6.0: 1.0}),
    (Softplus(k=0.5, sharpness=2.0, threshold=1.0), {1.0: 0.25 * math.log(2), 101.0: 50.0, -99.0: 0.0}),
    (Softplus(k=1.0, sharpness=1.0, threshold=0.0), {math.log(3): math.log(4), -math.log(3): math.log(4 / 3)}),
    (Sigmoid(gmax=2.0, threshold=1.0, temperature=0.5), {1.0: 1.0, 1 + math.log(3) / 2: 1.5, 1 - math.log(3) / 2: 0.5}),
    (Power(k=0.5, threshold=-1.0, p=3.0), {-2.0: 0.0, -1.0: 0.0, 0.0: 0.5, 1.0: 4.0}),
    (Power(k=1.0, threshold=0.0, p=1.5), {4.0: 8.0}),
    (Quantile(gmax=3.0, p=2.0), {0.0: 0.0, 0.5: 0.75, 1.0: 3.0}),
    (Quantile(gmax=2.0, p=0.5), {0.0: 0.0, 0.0625: 0.5, 0.25: 1.0, 1.0: 2.0}),
    (Quantile(gmax=2.0, p=1.0), {0.125: 0.25, 1.0: 2.0}),
    (Exp(k=2.0, threshold=0.5, cap=math.log(5)), {0.0: 0.0, 0.5: 0.0, 0.5 + math.log(2): 2.0, 40.0: 8.0}),
]


@pytest.mark.parametrize(("shape", "points"), BY_HAND)
def test_map_takes_the_value_worked_out_by_hand(shape, points):
    z = torch.tensor(list(points), dtype=torch.float64)
    assert shape(z).tolist() == pytest.approx(list(points.values()), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_map_never_decreases(shape):
    assert (shape()(torch.linspace(-6, 6, 1201, dtype=torch.float64)).diff() >= 0).all()


@pytest.mark.parametrize("shape", FROM_ZERO)
def test_default_map_gives_unconfident_pairs_almost_no_margin(shape):
    low = shape()(torch.linspace(-30, 0, 301))
    assert (low >= 0).all() and low.max() < 0.02
    assert 0.5 <= shape()(torch.tensor(2.0)).item() <= 1.0


@pytest.mark.parametrize("shape", [Piecewise, Softplus, Power, Exp])
def test_default_map_is_gentle_before_it_is_steep(shape):
    margin = shape()(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert margin[2] - margin[1] > 2 * (margin[1] - margin[0]) > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_map_keeps_shape_and_dtype_and_stays_finite_far_out(shape, dtype):
    margin = shape()(torch.tensor([[-1e4], [1e4]], dtype=dtype))
    assert margin.shape == (2, 1) and margin.dtype == dtype and torch.isfinite(margin).all()


WRONG = [
    (Linear, "k", -0.1, ">= 0"),
    (ClippedLinear, "gmax", -1.0, ">= 0"),
    (ClippedLinear, "high", 0.0, r"> low \(0.0\)"),
    (Piecewise, "k1", -0.1, ">= 0"),
    (Piecewise, "k2", 0.05, r">= k1 \(0.1\)"),
    (Piecewise, "t1", -0.5, r">= t0 \(0.0\)"),
    (Softplus, "k", -1.0, ">= 0"),
    (Softplus, "sharpness", 0.0, "> 0"),
    (Sigmoid, "gmax", -1.0, ">= 0"),
    (Sigmoid, "temperature", 0.0, "> 0"),
    (Power, "k", -1.0, ">= 0"),
    (Power, "p", 1.0, "> 1"),
    (Exp, "k", -1.0, ">= 0"),
    (Exp, "cap", 0.0, "> 0"),
    (Quantile, "gmax", -1.0, ">= 0"),
    (Quantile, "p", 0.0, "> 0"),
    *[(shape, field, math.nan, "finite") for shape in SHAPES for field in OPTIONS[shape]],
]


@pytest.mark.parametrize(("shape", "option", "value", "allowed"), WRONG)
def test_wrong_option_is_named_with_value_and_what_is_allowed(shape, option, value, allowed):
    with pytest.raises(ConfigError, match=rf"{shape.__name__}\.{option}={value} .*allowed: a .*{allowed}"):
        shape(**{option: value})


def test_the_base_of_all_shapes_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        MapShape()


@pytest.mark.parametrize("size", [1, 2, 5, 8, 101])
def test_median_and_scales_equal_the_standard_library(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    numbers = values.tolist()
    middle = statistics.median(numbers)
    assert median(values).item() == middle
    expected = 1.4826 * statistics.median(abs(number - middle) for number in numbers)
    assert robust_scale(values).item() == pytest.approx(expected, abs=1e-15)
    if size > 1:
        location, scale = location_and_scale(values, "z")
        assert location.item() == pytest.approx(statistics.fmean(numbers), abs=1e-15)
        assert scale.item() == pytest.approx(statistics.pstdev(numbers), rel=1e-14)
        location, scale = location_and_scale(values, "robust_z")
        assert (location.item(), scale.item()) == (middle, pytest.approx(expected))


def test_robust_scale_estimates_the_standard_deviation_of_normal_margins():
    values = 3 * torch.special.ndtri((torch.arange(10_001, dtype=torch.float64) + 0.5) / 10_001)  # normal quantiles
    assert robust_scale(values).item() == pytest.approx(3.0, rel=1e-3)


def test_one_wild_margin_moves_the_z_score_but_not_the_robust_one():
    margins = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    wild = torch.tensor([1.0, 2.0, 3.0, 4.0, 5000.0])
    assert location_and_scale(wild, "robust_z") == location_and_scale(margins, "robust_z")
    assert location_and_scale(wild, "z")[1] > 100 * location_and_scale(margins, "z")[1]


def test_raw_standardisation_changes_nothing():
    assert location_and_scale(torch.tensor([7.0, 7.0]), "raw") == (torch.tensor(0.0), torch.tensor(1.0))


def test_a_scale_of_zero_is_an_error_that_names_its_cause():
    with pytest.raises(DataError, match=r"scale of 3 margins is 0.*all margins are equal"):
        location_and_scale(torch.ones(3), "z")
    with pytest.raises(DataError, match="more than half of the margins equal their median"):
        location_and_scale(torch.tensor([0.0, 1.0, 1.0, 1.0, 9.0]), "robust_z")


@pytest.mark.parametrize("margins", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, math.nan])])
def test_margins_without_statistics_are_refused(margins):
    for standardize in ("raw", "z", "robust_z"):
        with pytest.raises(DataError, match="at least one margin, finite"):
            location_and_scale(margins, standardize)


def test_an_unknown_standardisation_lists_the_known_ones():
    with pytest.raises(ConfigError, match="standardize 'zscore'; allowed: raw, robust_z, z"):
        location_and_scale(torch.tensor([1.0, 2.0]), "zscore")

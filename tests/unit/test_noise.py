"""Label flips: rate, determinism, and independence of everything but seed and position."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gamma_po.data.noise import flip_mask
from gamma_po.errors import ConfigError

PAIRS = 20_000
RECORDED = [1, 8, 10, 12, 14, 20, 23]  # flip_mask(24, 0.25, seed=3)
STANDARD_DEVIATIONS = 4.5  # of a binomial count: passed by chance with probability 0.99999


def binomial_bound(trials: int, rate: float) -> float:
    return STANDARD_DEVIATIONS * math.sqrt(trials * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_the_number_of_flips_is_binomial_in_the_rate(rate: float) -> None:
    flips = int(flip_mask(PAIRS, rate, seed=7).sum())
    assert abs(flips - PAIRS * rate) < binomial_bound(PAIRS, rate)


def test_neighbouring_pairs_are_flipped_independently() -> None:
    mask = flip_mask(PAIRS, 0.3, seed=1)
    both = int((mask[1:] & mask[:-1]).sum())
    assert abs(both - PAIRS * 0.09) < 1.5 * binomial_bound(PAIRS, 0.09)


def test_different_seeds_flip_independently() -> None:
    both = int((flip_mask(PAIRS, 0.5, seed=0) & flip_mask(PAIRS, 0.5, seed=1)).sum())
    assert abs(both - PAIRS * 0.25) < binomial_bound(PAIRS, 0.25)


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 1), st.integers())
def test_the_first_pairs_do_not_depend_on_how_many_follow(first: int, more: int, rate: float, seed: int) -> None:
    assert torch.equal(flip_mask(first + more, rate, seed)[:first], flip_mask(first, rate, seed))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_a_higher_rate_flips_the_pairs_of_a_lower_one_and_more(a: float, b: float, seed: int) -> None:
    low, high = flip_mask(50, min(a, b), seed), flip_mask(50, max(a, b), seed)
    assert not (low & ~high).any()


def test_the_flips_of_a_seed_never_change() -> None:
    """Recorded once: a change would silently change every experiment with noise."""
    assert flip_mask(24, 0.25, seed=3).nonzero().flatten().tolist() == RECORDED


def test_rate_zero_flips_none_and_rate_one_flips_all() -> None:
    assert not flip_mask(1000, 0.0, seed=5).any()
    assert flip_mask(1000, 1.0, seed=5).all()


def test_the_mask_is_boolean_with_one_entry_per_pair() -> None:
    mask = flip_mask(11, 0.5, seed=0)
    assert mask.dtype == torch.bool and mask.shape == (11,)
    assert flip_mask(0, 0.5, seed=0).shape == (0,)


def test_global_random_state_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    random.seed(1)
    before, python_before = torch.random.get_rng_state(), random.getstate()
    mask = flip_mask(100, 0.5, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before) and random.getstate() == python_before
    torch.manual_seed(99)
    assert torch.equal(flip_mask(100, 0.5, seed=2), mask)


@pytest.mark.parametrize("rate", [-0.1, 1.0001, float("nan"), float("inf")])
def test_a_rate_outside_zero_to_one_is_refused_with_its_value(rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"\[0, 1\], found {rate}"):
        flip_mask(3, rate, seed=0)

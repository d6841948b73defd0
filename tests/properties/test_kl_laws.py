"""Laws of the KL margin, for any pool and any strength."""

from __future__ import annotations

import functools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gamma_po.margins.solver import kl_value, solve_kl_margins

ROUNDING = 1e-9  # reward units

softplus = functools.partial(functional.softplus, threshold=1000)  # the default is linear from 20 on
gamma0s = st.floats(0.05, 40)
ratios = st.floats(math.log(1e-4), math.log(100)).map(math.exp)


def pools_of(reach, min_size=1, max_size=24):
    values = st.one_of(st.floats(-reach, reach), st.integers(-2, 2).map(float))  # the integers make ties
    return st.lists(values, min_size=min_size, max_size=max_size).map(
        lambda values: torch.tensor(values, dtype=torch.float64)
    )


law = settings(deadline=None, max_examples=60)


@law
@given(pools_of(80), gamma0s, ratios)
def test_mean_margin_is_gamma0(h, gamma0, ratio):
    assert abs(solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio).mean().item() - gamma0) < ROUNDING


@law
@given(pools_of(80), gamma0s, ratios)
def test_confidence_raises_the_margin_but_never_overtakes_it(h, gamma0, ratio):
    h = h.sort().values
    steps = solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio).diff()
    assert (steps >= -ROUNDING).all()
    assert (steps <= h.diff() + ROUNDING).all()


@law
@given(pools_of(80), gamma0s, ratios)
def test_largest_to_smallest_margin_is_at_most_exp_gamma0_over_tau(h, gamma0, ratio):
    log_margin = solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio).log()
    assert log_margin.max() - log_margin.min() <= ratio + ROUNDING


@law
@given(pools_of(80), gamma0s, ratios, st.randoms(use_true_random=False))
def test_permuting_the_pool_permutes_the_margins(h, gamma0, ratio, random):
    order = list(range(len(h)))
    random.shuffle(order)
    solved = solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio)
    assert (solve_kl_margins(h[order], gamma0=gamma0, tau=gamma0 / ratio) - solved[order]).abs().max() < ROUNDING


@law
@given(pools_of(80), gamma0s, ratios)
def test_one_level_separates_margins_above_and_below_gamma0(h, gamma0, ratio):
    """γ lies between γ0 and h + ν: some ν in [γ0 - max h, γ0 - min h] fits every pair."""
    margin = solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio)
    least, most = gamma0 - h.max() - ROUNDING, gamma0 - h.min() + ROUNDING
    for reached in (margin - h)[margin > gamma0 + ROUNDING]:
        least = torch.maximum(least, reached - ROUNDING)
    for reached in (margin - h)[margin < gamma0 - ROUNDING]:
        most = torch.minimum(most, reached + ROUNDING)
    assert least <= most


@law
@given(pools_of(80), gamma0s, ratios, st.integers(0, 2**31), st.floats(0, 5))
def test_no_other_allocation_is_cheaper(h, gamma0, ratio, seed, spread):
    tau = gamma0 / ratio
    q = len(h) * torch.softmax(
        spread * torch.randn(len(h), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), 0
    )
    other = (softplus(gamma0 * q - h) + tau * q * q.log()).mean().item()
    assert kl_value(h, gamma0=gamma0, tau=tau).item() <= other + ROUNDING * max(1, abs(other))


@law
@given(pools_of(80, 8, 8), pools_of(80, 8, 8), gamma0s, ratios)
def test_the_value_is_convex_in_the_reward_margins(first, second, gamma0, ratio):
    options = {"gamma0": gamma0, "tau": gamma0 / ratio}
    chord = (kl_value(first, **options) + kl_value(second, **options)) / 2
    assert kl_value((first + second) / 2, **options) <= chord + ROUNDING


@law
@given(pools_of(6, 1, 6), st.floats(0.1, 5), st.floats(0.05, 10))
def test_training_with_a_detached_margin_descends_the_value(h, gamma0, ratio):
    """Danskin: the gradient of mean loss(h - stop_gradient(γ)) is that of V, by central differences."""
    options = {"gamma0": gamma0, "tau": gamma0 / ratio}
    leaf = h.clone().requires_grad_()
    softplus(solve_kl_margins(h, **options) - leaf).mean().backward()
    step = 1e-4
    for i, unit in enumerate(step * torch.eye(len(h), dtype=torch.float64)):
        slope = (kl_value(h + unit, **options) - kl_value(h - unit, **options)) / (2 * step)
        assert abs(slope - leaf.grad[i]) < 1e-6


@law
@given(pools_of(20), st.floats(0.1, 5), ratios)
def test_the_margin_acts_as_label_smoothing_per_pair(h, gamma0, ratio):
    margin = solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio)
    smoothing = torch.sigmoid(gamma0 - h) - torch.sigmoid(margin - h)
    leaf = h.clone().requires_grad_()
    (adaptive,) = torch.autograd.grad(softplus(margin - leaf).sum(), leaf)
    smoothed_loss = (1 - smoothing) * softplus(gamma0 - leaf) + smoothing * softplus(leaf - gamma0)
    (smoothed,) = torch.autograd.grad(smoothed_loss.sum(), leaf)
    assert (adaptive - smoothed).abs().max() < 1e-12
    assert (smoothing[margin < gamma0] >= 0).all() and (smoothing[margin > gamma0] <= 0).all()


@law
@given(pools_of(80), gamma0s)
def test_strong_kl_term_gives_gamma0_to_all(h, gamma0):
    assert (solve_kl_margins(h, gamma0=gamma0, tau=1e12 * gamma0) - gamma0).abs().max() < ROUNDING


@law
@given(pools_of(3), st.floats(0.3, 3))
def test_weak_kl_term_fills_water_up_to_one_level(h, gamma0):
    """The limit is max(0, h + ν); ν found by trying every number of pairs above water."""
    ordered = h.sort(descending=True).values
    levels = (gamma0 * len(h) - ordered.cumsum(0)) / torch.arange(1, len(h) + 1)
    expected = (h + levels[(ordered + levels > 0).nonzero().max()]).clamp_min(0)
    assert (solve_kl_margins(h, gamma0=gamma0, tau=1e-7 * gamma0) - expected).abs().max() < 2e-3


@law
@given(st.floats(-80, 80), st.integers(1, 50), gamma0s, ratios)
def test_equal_pairs_and_one_pair_alone_get_gamma0(value, size, gamma0, ratio):
    h = torch.full((size,), value, dtype=torch.float64)
    assert (solve_kl_margins(h, gamma0=gamma0, tau=gamma0 / ratio) - gamma0).abs().max() < ROUNDING


def test_the_margin_depends_on_the_level_of_confidence_not_only_on_differences():
    h = torch.tensor([0.0, 1.0], dtype=torch.float64)
    spreads = [solve_kl_margins(h + shift, gamma0=1.0, tau=0.5).diff().item() for shift in (0.0, 5.0)]
    assert spreads[0] > 5 * spreads[1] > 0

"""The exact KL solver against bisection in extended precision, and the authors' mirror descent against it."""

from __future__ import annotations

import warnings
from typing import ClassVar

import mpmath
import numpy as np
import pytest
import torch

from gamma_po.errors import ConfigError, DataError
from gamma_po.margins import solver
from gamma_po.margins.mirror_descent import mirror_descent_margins
from gamma_po.margins.optimality import kkt_residual
from gamma_po.margins.solver import kl_value, solve_kl_margins

EXACT = 1e-10  # reward units
PUBLISHED = [(4.0, 10.0), (5.0, 20.0), (3.0, 3.0), (0.375, 10.0)]  # (γ0, τ): Llama-3, Gemma-2, Qwen2.5, Mistral
LONG = np.longdouble


def logistic(z):
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def bisected(h, gamma0, tau, weight=None):
    """Optimal γ by two nested bisections on the price λ of one unit of mean γ, in extended precision.

    A pair's γ is where its marginal cost s(γ - h) γ0 + τ (1 + log(γ/γ0)) meets the price.
    """
    h, gamma0, tau = np.asarray(h, LONG), LONG(gamma0), LONG(tau)
    weight = np.full(h.shape, LONG(1) / h.size) if weight is None else np.asarray(weight, LONG)
    most = 1 - np.log(weight)  # no pair can have more than the whole of the margin

    def log_q_at(price):
        lo, hi = np.full(h.shape, (price - tau - gamma0) / tau), np.minimum((price - tau) / tau, most)
        for _ in range(62):
            middle = (lo + hi) / 2
            above = gamma0 * logistic(gamma0 * np.exp(middle) - h) + tau * (1 + middle) > price
            lo, hi = np.where(above, lo, middle), np.where(above, middle, hi)
        return (lo + hi) / 2

    lo, hi = tau, tau + gamma0
    for _ in range(62):
        price = (lo + hi) / 2
        lo, hi = (lo, price) if (weight * np.exp(log_q_at(price))).sum() > 1 else (price, hi)
    return gamma0 * np.exp(log_q_at((lo + hi) / 2))


def pools(size, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "typical": draw.normal(1, 2, size),
        "wide": draw.uniform(-80, 80, size),
        "ties": draw.integers(-2, 3, size).astype(float),
        "two levels": np.where(np.arange(size) % 2, 80.0, -80.0),
        "equal": np.full(size, -3.3),
        "confident": draw.normal(70, 4, size),
        "high outlier": np.where(np.arange(size) == 0, 80.0, -2.0),
        "low outlier": np.where(np.arange(size) == 0, -80.0, 2.0),
    }


@pytest.mark.parametrize("ratio", [1e-4, 0.25, 1.0, 2.0, 2.5, 10.0, 100.0])
@pytest.mark.parametrize("kind", list(pools(1)))
def test_solution_equals_extended_precision_bisection(kind, ratio):
    for size, gamma0 in ((1, 1.0), (2, 4.0), (33, 0.375), (7, 80.0)):
        h = pools(size)[kind]
        solved = solve_kl_margins(torch.from_numpy(h), gamma0=gamma0, tau=gamma0 / ratio)
        assert np.abs(solved.numpy() - bisected(h, gamma0, gamma0 / ratio)).max() < EXACT


@pytest.mark.parametrize("ratio", [0.5, 2.0, 10.0, 100.0])
def test_pools_side_by_side_are_solved_as_if_each_were_alone(ratio):
    kinds = pools(33)
    together = torch.from_numpy(np.stack(list(kinds.values()), axis=-1)).reshape(33, 2, 4)
    solved = solve_kl_margins(together, gamma0=4.0, tau=4.0 / ratio).reshape(33, 8)
    for column, h in enumerate(kinds.values()):
        assert np.abs(solved[:, column].numpy() - bisected(h, 4.0, 4.0 / ratio)).max() < EXACT


@pytest.mark.parametrize("ratio", [1.0, 100.0])
def test_solution_equals_bisection_in_fifty_digits(ratio):
    h, gamma0 = [-7.5, 0.25, 3.0], mpmath.mpf(2)
    with mpmath.workdps(50):
        tau = gamma0 / mpmath.mpf(ratio)

        def margin_at(price, reward):
            lo, hi = mpmath.mpf(0), gamma0 * 3  # no margin can exceed N times the mean
            for _ in range(60):
                middle = (lo + hi) / 2
                cost = gamma0 / (1 + mpmath.exp(reward - middle)) + tau * (1 + mpmath.log(middle / gamma0))
                lo, hi = (lo, middle) if cost > price else (middle, hi)
            return (lo + hi) / 2

        lo, hi = tau, tau + gamma0
        for _ in range(60):
            price = (lo + hi) / 2
            lo, hi = (lo, price) if sum(margin_at(price, r) for r in h) > 3 * gamma0 else (price, hi)
        expected = [float(margin_at(price, r)) for r in h]
    solved = solve_kl_margins(torch.tensor(h, dtype=torch.float64), gamma0=2.0, tau=2.0 / ratio)
    assert np.abs(solved.numpy() - expected).max() < EXACT


@pytest.mark.parametrize("ratio", [0.5, 2.0, 8.0, 100.0])
def test_solution_is_exact_for_65536_distinct_pairs(ratio):
    """Built backwards: given γ, the reward margins that make it optimal have a closed form."""
    gamma0, spread = LONG(1.5), min(0.8 * ratio, 5.0)
    log_q = np.random.default_rng(1).uniform(0, spread, 65_536).astype(LONG)
    log_q -= np.log(np.exp(log_q).mean())
    share = (log_q.max() + LONG(0.1) * ratio - log_q) / ratio  # s(γ - h) of each pair
    margin = gamma0 * np.exp(log_q)
    h = (margin - np.log(share / (1 - share))).astype(np.float64)
    solved = solve_kl_margins(torch.from_numpy(h), gamma0=1.5, tau=1.5 / ratio)
    assert np.abs(solved.numpy() - margin).max() < EXACT


@pytest.mark.parametrize("ratio", [0.5, 2.0, 100.0])
def test_solution_is_exact_for_one_outlier_and_for_ties_among_65536(ratio):
    levels, counts = np.array([-2.0, 0.5, 80.0]), np.array([40_000, 25_535, 1])
    solved = solve_kl_margins(torch.from_numpy(levels.repeat(counts)), gamma0=4.0, tau=4.0 / ratio).numpy()
    expected = bisected(levels, 4.0, 4.0 / ratio, counts / LONG(65_536)).repeat(counts)
    assert np.abs(solved - expected).max() < EXACT


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e9])
def test_extreme_ratios_are_solved_within_what_rounding_leaves(ratio):
    h = torch.linspace(-5, 5, 100, dtype=torch.float64)
    solved = solve_kl_margins(h, gamma0=2.0, tau=2.0 / ratio)
    expected = bisected(h.numpy(), 2.0, 2.0 / ratio)
    assert np.abs(solved.numpy() - expected).max() < max(EXACT, 1e-15 * ratio)


@pytest.mark.parametrize("ratio", [1e-4, 1.0, 2.0, 5.0, 100.0])
@pytest.mark.parametrize("gamma0", [0.1, 4.0, 20.0])
def test_work_is_bounded_for_every_pool(ratio, gamma0, monkeypatch):
    """The regression test of converged entries being bisected: they cost 30-100 steps per inner solve."""
    evaluations = []
    original = solver.stationarity
    monkeypatch.setattr(solver, "stationarity", lambda *args: evaluations.append(1) or original(*args))
    for h in pools(256).values():
        evaluations.clear()
        solve_kl_margins(torch.from_numpy(h), gamma0=gamma0, tau=gamma0 / ratio)
        assert len(evaluations) <= 130


def test_a_converged_entry_is_not_bisected_though_its_step_leaves_the_bracket():
    x, ulp = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0**-52], dtype=torch.float64)
    lo, hi, last = x.clone(), torch.tensor([101.0], dtype=torch.float64), torch.tensor([100.0], dtype=torch.float64)
    converged, *_ = solver._bracketed_step(x, ulp, ulp, lo, hi, last, torch.tensor([True]))
    assert converged.item() == 1.0 - 2.0**-52
    searching, *_ = solver._bracketed_step(x, -ulp, -90 * torch.ones(1), lo, hi, last, torch.tensor([False]))
    assert searching.item() == 51.0


class OnDevice(torch.Tensor):
    """A tensor as on an accelerator: it may be described and fetched; whatever else is done with it is noted."""

    fetched: ClassVar[int] = 0
    others: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            cls.fetched += 1
            return result.as_subclass(torch.Tensor)
        if function is torch.Tensor.detach:
            return result.as_subclass(cls)
        if function.__name__ not in ("__get__", "numel", "is_floating_point"):
            cls.others.append(function.__name__)
        return result


@pytest.mark.parametrize("ratio", [1e-4, 0.25, 1.0, 2.0, 2.5, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("gamma0", [0.05, 0.375, 4.0, 20.0, 80.0])
def test_a_device_is_waited_for_once_whatever_the_pool_and_the_strength(gamma0, ratio):
    """All decisions of the iterations are taken on the CPU, once the reward margins are there."""
    for h in pools(256).values():
        OnDevice.fetched, OnDevice.others = 0, []
        here = torch.from_numpy(h)
        there = solve_kl_margins(here.as_subclass(OnDevice), gamma0=gamma0, tau=gamma0 / ratio)
        assert (OnDevice.fetched, OnDevice.others) == (1, [])
        assert torch.equal(there, solve_kl_margins(here, gamma0=gamma0, tau=gamma0 / ratio))


def test_mirror_descent_and_the_running_price_wait_for_a_device_once_for_each_thing_given():
    h = torch.from_numpy(pools(64)["typical"]).as_subclass(OnDevice)
    OnDevice.fetched, OnDevice.others = 0, []
    mirror_descent_margins(h, gamma0=1.0, tau=1.0)
    assert (OnDevice.fetched, OnDevice.others) == (1, [])
    solver.priced_kl_margins(h, torch.tensor(0.5).double().as_subclass(OnDevice), gamma0=1.0, tau=1.0)
    assert (OnDevice.fetched, OnDevice.others) == (3, [])


def test_a_failed_joint_iteration_is_replaced_by_the_nested_one(monkeypatch):
    h = pools(33)["typical"]
    monkeypatch.setattr(solver, "JOINT_STEPS", 1)
    solved = solve_kl_margins(torch.from_numpy(h), gamma0=2.0, tau=1.0)
    assert np.abs(solved.numpy() - bisected(h, 2.0, 1.0)).max() < EXACT


def test_a_result_that_is_not_optimal_raises_instead_of_being_returned(monkeypatch):
    monkeypatch.setattr(solver, "BRACKETED_STEPS", 1)
    monkeypatch.setattr(solver, "POLISH_STEPS", 0)
    with pytest.raises(ArithmeticError, match=r"33 pairs did not converge: residual .* tau=0\.1"):
        solve_kl_margins(torch.from_numpy(pools(33)["wide"]), gamma0=1.0, tau=0.1)
    with pytest.raises(ArithmeticError, match="did not converge"):
        solve_kl_margins(torch.zeros(3), gamma0=1e200, tau=1e-200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_solved_in_float64_and_never_carries_a_gradient(dtype):
    h = torch.tensor([-1.5, 0.25, 3.0], dtype=dtype, requires_grad=True)
    solved = solve_kl_margins(h, gamma0=1.0, tau=0.5)
    assert solved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not solved.requires_grad
    rounding = 1e-10 if dtype == torch.float64 else 1e-7
    assert np.abs(solved.numpy() - bisected([-1.5, 0.25, 3.0], 1.0, 0.5)).max() < rounding


@pytest.mark.parametrize(
    ("option", "value"), [("gamma0", 0.0), ("tau", -1.0), ("tau", float("nan")), ("gamma0", 1e999)]
)
def test_a_wrong_option_is_named_with_its_value(option, value):
    options = {"gamma0": 1.0, "tau": 1.0, option: value}
    for function in (solve_kl_margins, kl_value, mirror_descent_margins):
        with pytest.raises(ConfigError, match=f"{option}={value}.*finite number > 0"):
            function(torch.zeros(3), **options)


@pytest.mark.parametrize("h", [torch.zeros(0), torch.zeros(0, 2), torch.tensor(1.0), torch.tensor([1, 2])])
def test_a_pool_of_wrong_shape_or_type_is_refused(h):
    with pytest.raises(DataError, match="at least one pair, floating point"):
        solve_kl_margins(h, gamma0=1.0, tau=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_a_reward_margin_that_is_not_finite_is_named(value, tau):
    with pytest.raises(DataError, match=f"reward margin {value} of pair 1 in a pool of 3 is not finite"):
        solve_kl_margins(torch.tensor([0.0, value, 1.0]), gamma0=1.0, tau=tau)


def test_the_residual_measures_distance_from_the_solution_in_reward_units():
    h, best, options = torch.zeros(2), torch.tensor([2.0, 2.0], dtype=torch.float64), {"gamma0": 2.0, "tau": 0.7}
    assert kkt_residual(best, h, **options) < 1e-15
    assert kkt_residual(best + 0.01, h, **options).item() == pytest.approx(0.01)
    apart = best + torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    assert kkt_residual(apart, h, **options).item() == pytest.approx(1e-4, rel=1e-3)
    assert kkt_residual(torch.tensor([4.0, 0.0]), h, **options) > 0.1


@pytest.mark.parametrize(("gamma0", "tau"), PUBLISHED)
def test_mirror_descent_reaches_the_exact_solution_at_the_published_settings(gamma0, tau):
    for kind in ("typical", "ties", "equal"):
        h = torch.from_numpy(pools(300)[kind])
        error = mirror_descent_margins(h, gamma0=gamma0, tau=tau) - solve_kl_margins(h, gamma0=gamma0, tau=tau)
        assert error.abs().max() <= 4e-6 * gamma0


@pytest.mark.parametrize(
    ("gamma0", "tau", "cause"), [(4.0, 2.0, "oscillates"), (1.0, 0.1, "far from converged after 20")]
)
def test_mirror_descent_warns_where_it_is_wrong(gamma0, tau, cause):
    h = torch.cat([torch.zeros(200), torch.linspace(0, 14, 56)])
    with pytest.warns(UserWarning, match=cause):
        approximate = mirror_descent_margins(h, gamma0=gamma0, tau=tau)
    assert (approximate - solve_kl_margins(h, gamma0=gamma0, tau=tau)).abs().max() > 0.1 * gamma0


TYPICAL = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 6.0], dtype=torch.float64)


OUTLIER = torch.cat([torch.full((49,), -3.0), torch.tensor([4.2])]).double()


@pytest.mark.parametrize(
    ("h", "gamma0", "tau", "steps", "far"),
    [(OUTLIER, 1.709, 0.636, 20, 0.05), (TYPICAL, 1.0, 1.0, 2, 0.2), (TYPICAL, 1.0, 10.0, 1, 0.04)],
)
def test_mirror_descent_warns_of_what_its_stability_limit_does_not_show(h, gamma0, tau, steps, far):
    exact = bisected(h, gamma0, tau)
    share = logistic(exact - h.numpy())
    assert tau >= 0.5 and (gamma0 / tau * exact * share * (1 - share)).max() < 3
    with pytest.warns(UserWarning, match=rf"has not converged after {steps} steps: .* reaches .* oscillates above 3 "):
        approximate = mirror_descent_margins(h, gamma0=gamma0, tau=tau, steps=steps)
    assert np.abs(approximate.numpy() - exact).max() > far * gamma0


@pytest.mark.parametrize(("gamma0", "tau"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.8), (0.3, 0.4), (4.0, 2.0)])
def test_mirror_descent_warns_exactly_where_it_is_a_thousandth_of_gamma0_off(gamma0, tau):
    for steps in (1, 2, 3, 5, 8, 13, 20, 60, 200):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            approximate = mirror_descent_margins(TYPICAL, gamma0=gamma0, tau=tau, steps=steps).numpy()
        assert bool(warned) is bool(np.abs(approximate - bisected(TYPICAL, gamma0, tau)).max() > 1e-3 * gamma0)


def test_mirror_descent_starts_to_warn_between_0_8_and_1_25_thousandths_of_gamma0():
    warned, silent, exact = [], [], bisected(TYPICAL, 0.1, 0.1)
    for steps in range(20, 61):  # each step takes about a tenth off the error
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            approximate = mirror_descent_margins(TYPICAL, gamma0=0.1, tau=0.1, steps=steps).numpy()
        (warned if said else silent).append(np.abs(approximate - exact).max() / 0.1)
    assert 0.8e-3 < max(silent) <= 1e-3 < min(warned) < 1.25e-3


@pytest.mark.filterwarnings("ignore:mirror descent has not converged")
def test_mirror_descent_reads_gamma_before_its_last_update():
    h = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    options = {"gamma0": 1.0, "tau": 2.0}
    assert mirror_descent_margins(h, steps=1, **options).tolist() == [1.0, 1.0]
    # one update from uniform p, η = 0.25: p ∝ exp(-0.25 s(1 - h))
    first, second = np.exp(-0.25 / (1 + np.exp(-2))), np.exp(-0.25 / (1 + np.exp(1)))
    expected = [2 * first / (first + second), 2 * second / (first + second)]
    assert mirror_descent_margins(h, steps=2, **options).tolist() == pytest.approx(expected, abs=1e-14)
    with pytest.raises(ConfigError, match="steps=0"):
        mirror_descent_margins(h, steps=0, **options)


def test_mirror_descent_is_silent_where_it_converges():
    h = torch.linspace(-3, 3, 50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = mirror_descent_margins(h, gamma0=1.0, tau=1.0)
    assert caught == [] and float((found - solve_kl_margins(h, gamma0=1.0, tau=1.0)).abs().max()) < 1e-3


def test_a_price_whose_margins_were_not_found_raises_instead_of_returning_them(monkeypatch):
    monkeypatch.setattr(solver, "BRACKETED_STEPS", 1)
    with pytest.raises(ArithmeticError, match=r"γ at the price μ = 2 was not found in 1 steps"):
        solver.priced_kl_margins(torch.tensor([0.3, -4.0]), torch.tensor(2.0).double(), gamma0=4.0, tau=1.0)


def test_the_value_of_equal_rewards_is_the_loss_at_gamma0_and_of_two_pairs_the_smallest_of_all_divisions():
    assert kl_value(torch.full((5,), 0.3), gamma0=2.0, tau=0.7).item() == pytest.approx(np.log1p(np.exp(1.7)), abs=1e-7)
    h, q = np.array([-1.0, 2.5])[:, None], np.linspace(1e-6, 2 - 1e-6, 2_000_001)
    shares = np.stack([q, 2 - q])
    cost = (np.logaddexp(0, 1.5 * shares - h) + 0.4 * shares * np.log(shares)).mean(0)
    best = kl_value(torch.tensor([-1.0, 2.5], dtype=torch.float64), gamma0=1.5, tau=0.4).item()
    assert best == pytest.approx(cost.min(), abs=1e-11) and best <= cost.min()

"""The KL margin by its parts, and margins stated divided by β."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO, WPO, BetaDPO, SimPO, WeightedSum, WithSFT, build_loss
from gamma_po.margins import (
    KL,
    Dual,
    Exact,
    GammaBetaRatio,
    KLAuthors,
    KLDual,
    Margin,
    MirrorDescent,
    RecentPool,
    SampledPool,
    build_margin,
    mirror_descent_margins,
)
from gamma_po.margins.base import strength
from tests import oracle
from tests.unit.test_margins import SOLVER_TOLERANCE, call

H = [[0.3, -1.0, 2.0, 0.9], [1.4, 0.2, -0.3, 0.5], [0.0, 2.2, 1.0, -2.0]]


@pytest.mark.parametrize(
    ("ready_made", "parts"),
    [
        (KL(gamma0=1.5, tau=1.0, center=True, history=5), {"solver": Exact(), "pool": RecentPool(history=5)}),
        (KL(gamma0=1.5, tau=1.0, center=True), {"pool": RecentPool(history=256)}),
        (KLDual(gamma0=1.5, tau=1.0, center=True, window=6), {"solver": Dual(window=6)}),
        (
            KLAuthors(gamma0=1.5, tau=1.0, center=True, sample=3, memory=7, seed=2),
            {"solver": MirrorDescent(steps=20), "pool": SampledPool(sample=3, memory=7, seed=2)},
        ),
    ],
)
def test_the_ready_made_kl_margins_are_kl_with_their_solver_and_pool(ready_made: Margin, parts: dict[str, Any]) -> None:
    margin = build_margin("kl", gamma0=1.5, tau=1.0, center=True, **parts)
    states = [ready_made.init(), margin.init()]
    for h in H:
        (ours, states[0]), (theirs, states[1]) = (
            call(m, h, s) for m, s in zip((ready_made, margin), states, strict=True)
        )
        assert ours == theirs
    assert torch.equal(states[0][0], states[1][0])


def test_solver_and_pool_of_the_kl_margin_are_chosen_apart() -> None:
    """Exact over the authors' sample of everything; mirror descent over recent history."""
    options = {"gamma0": 1.5, "tau": 1.0, "center": False}
    sampled = build_margin("kl", pool=SampledPool(sample=4, memory=4), **options)
    got, state = call(sampled, H[0])
    got, _ = call(sampled, H[1], state)
    assert got == pytest.approx(oracle.kl_margins(H[1] + H[0], 1.5, 1.0)[:4], abs=SOLVER_TOLERANCE)
    descended = build_margin("kl", solver=MirrorDescent(steps=3), pool=RecentPool(history=2), **options)
    pool = torch.tensor(H[0][2:] + H[1], dtype=torch.float64)
    with pytest.warns(UserWarning, match="mirror descent has not converged after 3 steps"):
        _, state = call(descended, H[0])
        got, _ = call(descended, H[1], state)
        assert got == mirror_descent_margins(pool, gamma0=1.5, tau=1.0, steps=3)[2:].tolist()
    assert got != pytest.approx(oracle.kl_margins(pool.tolist(), 1.5, 1.0)[2:], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": Dual(), "history": 9},
            r"kl.history=9 .* nothing with kl.solver=Dual\(window=512\), which has no pool",
        ),
        ({"solver": Dual(), "pool": RecentPool()}, r"kl.pool=RecentPool\(history=256\) .* nothing with kl.solver=Dual"),
        ({"history": 9, "pool": SampledPool()}, r"kl.history=9 .* nothing beside kl.pool=SampledPool"),
    ],
)
def test_a_part_of_the_kl_margin_that_nothing_would_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_margin("kl", **options)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (RecentPool, {"history": -1}, "RecentPool.history=-1 is not allowed; allowed: an integer >= 0"),
        (SampledPool, {"sample": -1}, "SampledPool.sample=-1"),
        (SampledPool, {"memory": 3}, "SampledPool.memory=3 is not allowed; allowed: an integer >= SampledPool.sample"),
        (MirrorDescent, {"steps": 0}, "MirrorDescent.steps=0"),
        (Dual, {"window": 0}, "Dual.window=0"),
        (KLDual, {"window": 0}, "Dual.window=0"),
        (KLAuthors, {"memory": 3}, "SampledPool.memory=3"),
    ],
)
def test_parts_of_the_kl_margin_check_their_ranges(part: type, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**options)


RATIO = GammaBetaRatio(gamma_beta_ratio=0.4)


@pytest.mark.parametrize(
    ("name", "option"),
    [("fixed", "gamma"), ("kl", "gamma0"), ("kl_dual", "gamma0"), ("kl_authors", "gamma0"), ("alpha_dpo", "gamma0")],
)
def test_a_margin_stated_over_beta_becomes_reward_units_with_the_losss_beta(name: str, option: str) -> None:
    """SimPO's γ/β = 0.4 at β = 2.5 is a margin of 1."""
    margin = build_margin(name, **{option: RATIO})
    assert margin.bind(SimPO(beta=2.5)) == build_margin(name, **{option: 1.0}).bind(SimPO(beta=2.5))
    assert getattr(margin.bind(WithSFT(loss=SimPO(beta=10.0))), option) == 4.0
    wrapped = build_margin("reverse", inner=margin).bind(SimPO(beta=2.5))
    assert getattr(wrapped.inner, option) == 1.0
    with pytest.raises(ConfigError, match=rf"{name}.{option}=Gamma.*0.4\) is undecided: bind the margin to a loss"):
        call(build_margin(name, **{option: RATIO}, **({"beta": 1.0} if name == "alpha_dpo" else {})), [0.1, 0.2])


@pytest.mark.parametrize("name", ["fixed", "kl", "alpha_dpo"])
def test_a_margin_stated_over_beta_is_refused_where_there_is_no_one_beta(name: str) -> None:
    margin = build_margin(name, **{"gamma" if name == "fixed" else "gamma0": RATIO})
    changing = BetaDPO(loss=DPO())
    for loss in (changing, WPO(loss=changing), WeightedSum(losses=(changing, DPO()), weights=(1.0, 1.0))):
        with pytest.raises(
            ConfigError, match=rf"0.4\) is not allowed with the loss '{loss.name}', which has another beta"
        ):
            margin.bind(loss)
    with pytest.raises(ConfigError, match=r"the loss 'orpo', which has no beta; allowed: a number, in reward units"):
        margin.bind(build_loss("orpo"))


def test_a_ratio_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gamma_beta_ratio=nan is not allowed; allowed: a finite number"):
        GammaBetaRatio(gamma_beta_ratio=math.nan)
    with pytest.raises(ConfigError, match=r"kl.gamma0=GammaBetaRatio\(gamma_beta_ratio=0.0\) .*: a ratio > 0"):
        build_margin("kl", gamma0=GammaBetaRatio(gamma_beta_ratio=0.0))
    with pytest.raises(ConfigError, match=r"kl does not use the option 'gamma_beta_ratio'"):
        build_margin("kl", gamma_beta_ratio=0.4)  # one place for both, so that never both are given


def test_the_strength_of_a_margin_stated_over_beta_is_known_once_it_is_bound() -> None:
    margin = build_margin("kl", gamma0=RATIO, tau=4.0)
    assert strength(margin) is None and strength(margin.bind(SimPO(beta=10.0))) == 1.0

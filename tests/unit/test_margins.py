"""Every margin against an independent derivation, and the laws all margins obey."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from gamma_po.errors import ConfigError, DataError
from gamma_po.losses import DPO, SFT, WPO, BetaDPO, Loss, WeightedSum, WithSFT, build_loss
from gamma_po.margins import (
    KL,
    MARGINS,
    Dual,
    Fixed,
    KLAuthors,
    KLDual,
    Margin,
    MirrorDescent,
    NoMargin,
    RecentPool,
    SampledPool,
    Shuffled,
    build_margin,
    mirror_descent_margins,
)
from gamma_po.margins.base import strength
from gamma_po.margins.maps import Linear, Piecewise, Power, Quantile, Softplus
from gamma_po.ranks import Gathered, Local, Ranks
from gamma_po.state import state_to_plain
from gamma_po.types import Evidence, PairLogps
from tests import oracle
from tests.contracts import MarginContract, on_two_ranks, random_evidence

SOLVER_TOLERANCE = 1e-9
WITHOUT_POOL = [
    build_margin("column"),
    build_margin("alpha_dpo", beta=2.0),
    build_margin("amapo", beta=1.0),
    build_margin("kl", tau=0.5, center=True, history=0),
    build_margin("kl_dual", tau=0.5, center=True),
    build_margin("kl_authors", tau=2.0, center=True, sample=0),
]


def fitted(margin: Margin, seed: int = 3) -> tuple[Margin, Any]:
    """The margin with the state that a training split of 50 pairs gives."""
    return margin, margin.fit(random_evidence(50, seed=seed).reference)


class TestConstant(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [fitted(NoMargin()), fitted(Fixed(gamma=0.7))]


class TestKL(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [
            fitted(build_margin("kl", gamma0=1.0, tau=0.5, center=True)),
            fitted(build_margin("kl", gamma0=2.0, tau=0.3, center=False, history=4)),
        ]


class TestKLDual(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        fresh = fitted(build_margin("kl_dual", gamma0=1.0, tau=0.5, center=True))
        _, state = call(fresh[0], [0.5, -1.0, 2.0])
        return [fresh, (fresh[0], state), (build_margin("kl_dual", tau=0.2, center=False, window=4), state)]


class TestKLAuthors(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        margin = build_margin("kl_authors", gamma0=1.0, tau=2.0, center=True, sample=3, memory=5)
        _, state = call(margin, [0.5, -1.0, 2.0, 0.1])
        return [fitted(margin), (margin, state)]


class TestKLParts(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        sampled = build_margin("kl", gamma0=2.0, tau=0.5, center=False, pool=SampledPool(sample=2, memory=5))
        descended = build_margin("kl", tau=2.0, center=True, solver=MirrorDescent(steps=15), pool=RecentPool(history=3))
        priced = build_margin("kl", tau=0.5, center=True, solver=Dual(window=9))
        return [(margin, call(margin, [0.5, -1.0, 2.0, 0.1])[1]) for margin in (sampled, descended, priced)]


class TestColumn(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [
            fitted(build_margin("column", scale=0.5, transform="identity")),
            fitted(build_margin("column", transform="log")),
        ]


class TestRunning(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [fitted(build_margin("alpha_dpo", beta=2.0)), fitted(build_margin("amapo", beta=1.0))]


class TestShuffled(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [
            fitted(build_margin("shuffled", inner=build_margin("kl", tau=0.5, center=True))),
            fitted(build_margin("shuffled", inner=build_margin("map"), seed=3)),
            *remembering("shuffled"),
        ]


class TestMap(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [
            fitted(build_margin("map")),
            fitted(build_margin("map", shape=Softplus(), standardize="z", length_norm=True, budget=0.5)),
            fitted(build_margin("map", shape=Power(), standardize="quantile")),
        ]


class TestReverse(MarginContract):
    def margins(self) -> list[tuple[Margin, Any]]:
        return [
            fitted(build_margin("reverse", inner=build_margin("kl", tau=0.5, center=True))),
            fitted(build_margin("reverse", inner=build_margin("map"))),
            *remembering("reverse"),
        ]


def remembering(name: str) -> list[tuple[Margin, Any]]:
    """An ablation of every margin that has no pool of its own, some steps into a training; and of the constant ones."""
    found = [fitted(build_margin(name, inner=inner)) for inner in (NoMargin(), Fixed(gamma=0.7))]
    for inner in WITHOUT_POOL:
        margin = build_margin(name, inner=inner, history=5)
        state = margin.init()
        for seed in range(3):
            _, state = margin(
                torch.randn(4, generator=torch.Generator().manual_seed(seed)), with_column(4, seed), state
            )
        found.append((margin, state))
    return found


def with_column(count: int, seed: int) -> Evidence:
    """Any pairs with a number each from the data."""
    column = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100)) + 0.5
    return random_evidence(count, seed=seed)._replace(column=column)


def call(margin: Margin, h: list[float], state: Any = None) -> tuple[list[float], Any]:
    """γ for reward margins given as numbers, with any evidence."""
    state = margin.init() if state is None else state
    target_margin, state = margin(torch.tensor(h, dtype=torch.float64), random_evidence(len(h)), state)
    return target_margin.tolist(), state


def test_none_is_zero_and_fixed_is_its_constant() -> None:
    assert call(NoMargin(), [1.0, -2.0])[0] == [0.0, 0.0]
    assert call(Fixed(gamma=0.7), [1.0, -2.0])[0] == [0.7, 0.7]


def test_kl_solves_the_allocation_over_this_step_and_the_history() -> None:
    margin = build_margin("kl", gamma0=1.5, tau=0.4, center=False)
    first, second = [0.3, -1.0, 2.0], [1.0, 0.0]
    got, state = call(margin, first)
    assert got == pytest.approx(oracle.kl_margins(first, 1.5, 0.4), abs=SOLVER_TOLERANCE)
    got, _ = call(margin, second, state)
    assert got == pytest.approx(oracle.kl_margins(first + second, 1.5, 0.4)[3:], abs=SOLVER_TOLERANCE)


def test_centred_kl_is_absolute_kl_minus_gamma0() -> None:
    h = [0.3, -1.0, 2.0]
    absolute, _ = call(build_margin("kl", gamma0=1.5, tau=0.4, center=False), h)
    centred, _ = call(build_margin("kl", gamma0=1.5, tau=0.4, center=True), h)
    assert centred == pytest.approx([gamma - 1.5 for gamma in absolute], abs=1e-14)


def test_kl_keeps_only_the_most_recent_history() -> None:
    margin = build_margin("kl", center=True, history=3)
    state = margin.init()
    for h in ([1.0, 2.0], [3.0, 4.0]):
        _, state = call(margin, h, state)
    assert state.reward_margin.tolist() == [2.0, 3.0, 4.0]
    _, state = call(build_margin("kl", center=True, history=0), [1.0, 2.0])
    assert state.reward_margin.tolist() == []


def test_kl_leaves_a_uniform_pool_alone_when_centred() -> None:
    got, _ = call(build_margin("kl", gamma0=2.0, tau=0.5, center=True), [0.8] * 5)
    assert got == pytest.approx([0.0] * 5, abs=SOLVER_TOLERANCE)


def test_kl_is_centred_with_dpo_and_ipo_and_absolute_with_simpo_unless_told() -> None:
    open_margin = build_margin("kl")
    assert open_margin.bind(build_loss("dpo")).center is True
    assert open_margin.bind(build_loss("ipo")).center is True
    assert open_margin.bind(build_loss("simpo")).center is False
    assert build_margin("kl", center=False).bind(build_loss("dpo")).center is False
    with pytest.raises(ConfigError, match=r"kl.center is undecided"):
        call(open_margin, [1.0])


class _TwoRanks(Ranks):
    """Two simulated ranks: the other one's values are given."""

    world_size = 2

    def __init__(self, rank: int, other: list[float]) -> None:
        self.rank, self.other = rank, torch.tensor(other, dtype=torch.float64)

    def gather(self, values: torch.Tensor) -> Gathered:
        pieces = [values, self.other] if self.rank == 0 else [self.other, values]
        return Gathered(torch.cat(pieces), 0 if self.rank == 0 else len(self.other))


def test_kl_over_two_ranks_equals_one_rank_with_both_batches_and_keeps_one_history() -> None:
    margin = build_margin("kl", gamma0=1.5, tau=0.4, center=True, history=4)
    h = [0.3, -1.0, 2.0, 0.1, 0.7]
    whole, whole_state = call(margin, h)
    parts = []
    for rank, (mine, other) in enumerate([(h[:2], h[2:]), (h[2:], h[:2])]):
        values = torch.tensor(mine, dtype=torch.float64)
        part, state = margin(values, random_evidence(len(mine)), margin.init(), _TwoRanks(rank, other))
        parts += part.tolist()
        assert torch.equal(state.reward_margin, whole_state.reward_margin)
    assert parts == pytest.approx(whole, abs=1e-14)


def reference_with_margins(margins: list[float]) -> PairLogps:
    """Reference log-probabilities with the given chosen-minus-rejected margins."""
    rejected = torch.full((len(margins),), -20.0, dtype=torch.float64)
    lengths = torch.full((len(margins),), 10)
    return PairLogps(rejected + torch.tensor(margins, dtype=torch.float64), rejected, lengths, 2 * lengths)


def map_margins(margin: Margin, train: list[float], pairs: list[float]) -> list[float]:
    """γ of pairs with the given reference margins after fitting on others."""
    evidence = random_evidence(len(pairs))._replace(reference=reference_with_margins(pairs))
    return margin(torch.zeros(len(pairs), dtype=torch.float64), evidence, margin.fit(reference_with_margins(train)))[
        0
    ].tolist()


def test_map_standardises_with_median_and_mad_of_the_training_split() -> None:
    # training margins 0, 1, 2, 4, 100: median 2, absolute deviations 2, 1, 0, 2, 98 with median 2
    margin = build_margin("map", shape=Linear(g0=0.0, k=1.0))
    got = map_margins(margin, [100.0, 0.0, 1.0, 2.0, 4.0], [2.0, 4.0, -3.0])
    assert got == pytest.approx([0.0, 2 / (1.4826 * 2), -5 / (1.4826 * 2)], abs=1e-12)


def test_map_can_read_log_probabilities_per_token() -> None:
    # ten chosen tokens with -20 + m nats, twenty rejected ones with -20
    margin = build_margin("map", shape=Linear(g0=0.0, k=1.0), standardize="raw", length_norm=True)
    got = map_margins(margin, [-1.0, 1.0], [1.0, 0.0, 30.0])
    assert got == pytest.approx([-1.9 + 1.0, -2.0 + 1.0, 1.0 + 1.0], abs=1e-12)


def test_map_can_standardise_by_mean_and_population_sd() -> None:
    margin = build_margin("map", shape=Linear(g0=0.0, k=1.0), standardize="z")
    assert map_margins(margin, [1.0, 5.0], [5.0, 3.0, 9.0]) == pytest.approx([1.0, 0.0, 3.0], abs=1e-12)


def test_map_rescales_to_its_budget_over_the_training_split() -> None:
    train = [-2.0, 0.0, 1.0, 3.0, 5.0]
    margin = build_margin("map", shape=Softplus(), budget=0.8)
    assert sum(map_margins(margin, train, train)) / len(train) == pytest.approx(0.8, abs=1e-12)


@pytest.mark.parametrize("loss", [DPO(beta=0.2), WPO(loss=DPO(beta=0.2)), WithSFT(loss=DPO(beta=0.2))])
def test_map_in_log_ratio_units_is_multiplied_by_beta_and_its_budget_with_it(loss: Loss) -> None:
    """The published review asks ℓ(β (r_w - r_l - g)): γ = β g."""
    train = [-2.0, 0.0, 1.0, 3.0, 5.0]
    for options in ({}, {"budget": 0.8}, {"standardize": "quantile"}):
        plain = build_margin("map", shape=Softplus(), **options)
        scaled = build_margin("map", shape=Softplus(), units="logratio", **options)
        expected = [0.2 * gamma for gamma in map_margins(plain, train, train)]
        for margin in (scaled.bind(loss), build_margin("map", **{**vars(scaled), "beta": 0.2}).bind(DPO(beta=9.0))):
            assert map_margins(margin, train, train) == pytest.approx(expected, abs=1e-14)
        mirrored = build_margin("reverse", inner=scaled).bind(loss)
        assert map_margins(mirrored, train, train) == pytest.approx(expected[::-1], abs=1e-14)
        assert plain.bind(loss) is plain


def test_map_in_log_ratio_units_needs_a_beta() -> None:
    margin = build_margin("map", units="logratio")
    with pytest.raises(ConfigError, match=r"map.beta is undecided: the loss 'orpo' has no beta, so give one"):
        margin.bind(build_loss("orpo"))
    with pytest.raises(ConfigError, match=r"map.beta is undecided: give beta, or bind the margin to a loss"):
        map_margins(margin, [1.0, 2.0], [1.0])


def test_a_budget_that_no_rescaling_can_meet_is_refused() -> None:
    margin = build_margin("map", shape=Linear(g0=-1.0, k=1.0), standardize="z", budget=0.5)
    with pytest.raises(ConfigError, match=r"map.budget=0.5 cannot be met: the map gives γ with mean -1"):
        margin.fit(reference_with_margins([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("standardize", ["raw", "z", "robust_z", "quantile"])
@pytest.mark.parametrize("train", [[], [1.0, math.nan, 3.0], [1.0, 2.0, -math.inf]], ids=["none", "nan", "inf"])
def test_a_map_cannot_be_fitted_on_reference_margins_without_statistics(standardize: str, train: list[float]) -> None:
    margin = build_margin("map", shape=Softplus(), standardize=standardize)
    with pytest.raises(DataError, match=r"have no statistics; allowed: .* at least one margin, finite values"):
        margin.fit(reference_with_margins(train))


@pytest.mark.parametrize(("strength", "sign"), [(2.0, 1), (-3.0, -1), (0.0, 1)])
def test_reverse_of_a_map_multiplies_by_the_size_of_its_strength(strength: float, sign: int) -> None:
    """γ = |strength| max(0, sign m): four pairs with sign m = -1, 0, 2, 5 in another order."""
    train = [sign * m for m in (2.0, -1.0, 5.0, 0.0)]
    shape = Piecewise(k1=1.0, k2=1.0, t0=0.0, t1=0.0)
    inner = build_margin("map", shape=shape, standardize="raw", strength=strength)
    size = abs(strength)
    assert map_margins(inner, train, train) == pytest.approx([2 * size, 0.0, 5 * size, 0.0], abs=1e-12)
    reverse = map_margins(build_margin("reverse", inner=inner), train, train)
    assert reverse == pytest.approx([0.0, 5 * size, 0.0, 2 * size], abs=1e-12)


def test_map_gives_almost_nothing_to_ambiguous_pairs_and_more_to_confident_ones() -> None:
    train = torch.linspace(-3, 3, 101).tolist()
    for shape in (Piecewise(), Softplus()):
        low, middle, high = map_margins(build_margin("map", shape=shape), train, [-3.0, 0.2, 3.0])
        assert 0 <= low < 0.05 and low <= middle < high


def test_map_before_fitting_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no statistics yet.*training split"):
        call(build_margin("map"), [1.0])


def test_reverse_gives_the_same_margins_in_reverse_rank_order() -> None:
    h = [0.3, -1.0, 2.0, 0.9]
    inner = build_margin("kl", gamma0=1.5, tau=0.4, center=False)
    plain, _ = call(inner, h)
    reverse, _ = call(build_margin("reverse", inner=inner), h)
    assert sorted(reverse) == pytest.approx(sorted(plain), abs=1e-14)
    by_reward = sorted(range(4), key=lambda i: h[i])
    assert [reverse[i] for i in by_reward] == sorted(plain, reverse=True)


def test_reverse_of_kl_acts_on_the_pool_so_one_pair_at_a_time_is_reversed_too() -> None:
    inner = build_margin("kl", gamma0=1.5, tau=0.4, center=False)
    _, state = call(inner, [0.0, 1.0, 2.0, 3.0])
    (plain,), _ = call(inner, [5.0], state)
    (reverse,), _ = call(build_margin("reverse", inner=inner), [5.0], state)
    pool = oracle.kl_margins([0.0, 1.0, 2.0, 3.0, 5.0], 1.5, 0.4)
    assert plain == pytest.approx(max(pool), abs=SOLVER_TOLERANCE)
    assert reverse == pytest.approx(min(pool), abs=SOLVER_TOLERANCE)


def test_reverse_of_a_map_mirrors_ranks_in_the_training_split() -> None:
    train = [-2.0, 0.0, 1.0, 3.0, 5.0]
    inner = build_margin("map", shape=Softplus())
    plain = map_margins(inner, train, train)
    assert map_margins(build_margin("reverse", inner=inner), train, train) == pytest.approx(plain[::-1], abs=1e-14)


def test_reverse_of_a_map_gives_tied_pairs_the_average_of_what_their_ranks_receive() -> None:
    train = [1.0, 1.0, 0.0, 1.0]
    inner = build_margin("map", shape=Linear(g0=0.0, k=0.75), standardize="raw")
    assert map_margins(inner, train, train) == pytest.approx([0.75, 0.75, 0.0, 0.75], abs=1e-14)
    # the lowest takes 0.75; the ranks of the three ties take 0.75, 0.75 and 0
    reverse = map_margins(build_margin("reverse", inner=inner), train, train)
    assert reverse == pytest.approx([0.5, 0.5, 0.75, 0.5], abs=1e-14)


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_ablations_of_a_map_keep_the_mean_over_the_training_split_also_with_ties(name: str) -> None:
    train = [2.0, -1.0, 0.0, 2.0, 2.0, 5.0, 0.0, 7.0, 2.0]
    inner = build_margin("map", shape=Softplus(), standardize="raw")
    plain, got = map_margins(inner, train, train), map_margins(build_margin(name, inner=inner), train, train)
    assert sum(got) == pytest.approx(sum(plain), abs=1e-12) and got != pytest.approx(plain, abs=1e-3)


def test_strength_sees_through_ablations_and_is_none_without_gamma0_and_tau() -> None:
    inner = build_margin("kl", gamma0=3.0, tau=4.0)
    assert [strength(inner), strength(build_margin("reverse", inner=inner))] == [0.75, 0.75]
    assert [strength(build_margin(name)) for name in ("fixed", "alpha_dpo", "map")] == [None] * 3
    assert strength(build_margin("shuffled", inner=build_margin("map"))) is None


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_ablations_need_what_their_inner_margin_needs(name: str) -> None:
    of_map, of_kl = build_margin(name, inner=build_margin("map")), build_margin(name)
    assert of_map.needs_reference and of_map.needs_fit
    assert not of_kl.needs_reference and not of_kl.needs_fit


@pytest.mark.parametrize("name", ["map", "alpha_dpo", "reverse"])
def test_margins_of_the_reference_say_what_is_missing(name: str) -> None:
    inner = build_margin("map")
    options = {"map": {}, "alpha_dpo": {"beta": 1.0}, "reverse": {"inner": inner}}[name]
    margin, evidence = build_margin(name, **options), random_evidence(3)
    state, needed = margin.fit(evidence.reference), "map" if name == "reverse" else name
    with pytest.raises(
        ConfigError, match=rf"the margin '{needed}' needs the reference's.*reference=None; allowed: Pair"
    ):
        margin(torch.zeros(3), evidence._replace(reference=None), state)


def test_a_quantile_shape_is_gmax_times_the_mid_rank_to_any_power() -> None:
    for p, expected in ((0.5, [0.0, 0.75, 1.5]), (1.0, [0.0, 0.375, 1.5]), (3.0, [0.0, 1.5 / 64, 1.5])):
        margin = build_margin("map", shape=Quantile(gmax=1.5, p=p), standardize="quantile")
        # training margins 1, 2, 2, 2: 0 lies below all, 9 above all, 1.5 above a quarter
        assert map_margins(margin, [2.0, 1.0, 2.0, 2.0], [0.0, 1.5, 9.0]) == pytest.approx(expected, abs=1e-12)


def test_a_quantile_shape_refuses_a_score_that_is_no_quantile() -> None:
    with pytest.raises(ConfigError, match=r"map.standardize='robust_z' .*: quantile with map.shape=Quantile\(gmax=1"):
        build_margin("map", shape=Quantile())


@pytest.mark.parametrize(("gap", "count"), [(0.7, 6), (0.3, 31), (0.0, 3), (-0.1, 7), (2.9, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_dpo_gives_every_pair_gamma0_where_only_rounding_sets_gaps_apart(
    gap: float, count: int, dtype: torch.dtype
) -> None:
    lengths = torch.arange(count) + 1
    rejected = -2.0 * lengths
    policy = PairLogps((rejected + gap * lengths).to(dtype), rejected.to(dtype), lengths, lengths)
    reference = PairLogps((rejected + 0.1 * lengths).to(dtype), rejected.to(dtype), lengths, lengths)
    margin = build_margin("alpha_dpo", gamma0=0.5, beta=2.0, alpha=3.0)
    state = margin.init()
    for _ in range(3):
        got, state = margin(torch.zeros(count, dtype=dtype), Evidence(policy, reference), state)
        assert got.tolist() == [0.5] * count


def test_quantile_map_uses_mid_ranks_in_the_training_split() -> None:
    margin = build_margin("map", shape=Linear(g0=0.0, k=1.0), standardize="quantile")
    got = map_margins(margin, [1.0, 2.0, 2.0, 5.0], [0.0, 1.0, 2.0, 3.0, 5.0, 9.0])
    assert got == pytest.approx([0.0, 0.125, 0.5, 0.75, 0.875, 1.0])


def test_quantiles_are_float64() -> None:
    margin = build_margin("map", shape=Linear(g0=0.0, k=1.0), standardize="quantile")
    assert map_margins(margin, [1.0, 2.0, 3.0], [1.0, 3.0]) == pytest.approx([1 / 6, 5 / 6], abs=1e-15)


def test_shuffled_gives_the_same_margins_to_other_pairs_and_anew_each_step() -> None:
    h = torch.linspace(-2, 2, 12).tolist()
    inner = build_margin("kl", gamma0=1.5, tau=0.4, center=False)
    margin = build_margin("shuffled", inner=inner)
    plain, _ = call(inner, h)
    first, state = call(margin, h)
    second, _ = call(margin, h, state._replace(inner=inner.init()))  # the same pool, one step later
    assert sorted(first) == pytest.approx(sorted(plain), abs=1e-14) and first != plain
    assert sorted(second) == pytest.approx(sorted(plain), abs=1e-14) and first != second


def test_shuffled_map_keeps_one_permutation_of_the_training_split() -> None:
    train = [-2.0, 0.0, 1.0, 3.0, 5.0, 7.0]
    inner = build_margin("map", shape=Softplus())
    margin = build_margin("shuffled", inner=inner, seed=1)
    state = margin.fit(reference_with_margins(train))
    evidence = random_evidence(6)._replace(reference=reference_with_margins(train))
    first, state = margin(torch.zeros(6, dtype=torch.float64), evidence, state)
    second, _ = margin(torch.zeros(6, dtype=torch.float64), evidence, state)
    assert torch.equal(first, second)
    plain = map_margins(inner, train, train)
    assert sorted(first.tolist()) == pytest.approx(sorted(plain), abs=1e-14) and first.tolist() != plain


def test_dual_equals_the_exact_solution_at_its_first_step_and_where_the_rewards_stay_the_same() -> None:
    h, options = [0.3, -1.0, 2.0, 0.9], {"gamma0": 1.5, "tau": 0.4, "center": False}
    margin, exact = build_margin("kl_dual", window=4, **options), oracle.kl_margins([0.3, -1.0, 2.0, 0.9], 1.5, 0.4)
    got, state = call(margin, h)
    assert got == pytest.approx(exact, abs=SOLVER_TOLERANCE)
    for _ in range(3):
        got, state = call(margin, h, state)
        assert got == pytest.approx(exact, abs=SOLVER_TOLERANCE)


def at_price(mu: float, h: list[float], gamma0: float, tau: float) -> list[float]:
    """γ of each pair where log(γ/γ0) + (γ0/τ) s(γ - h), which grows with γ, meets the price: by bisection."""
    found = []
    for reward in h:
        low, high = gamma0 * math.exp(mu - gamma0 / tau), gamma0 * math.exp(mu)
        for _ in range(100):
            middle = (low + high) / 2
            above = math.log(middle / gamma0) + gamma0 / tau / (1 + math.exp(reward - middle)) > mu
            low, high = (low, middle) if above else (middle, high)
        found.append((low + high) / 2)
    return found


def priced(h: list[float], gamma0: float, tau: float) -> float:
    """The price at which mean γ over the pairs is γ0: by bisection."""
    low, high = 0.0, gamma0 / tau
    for _ in range(100):
        middle = (low + high) / 2
        above = sum(at_price(middle, h, gamma0, tau)) > len(h) * gamma0
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize(("window", "share"), [(2, 1.0), (3, 1.0), (12, 0.25)])
def test_dual_takes_a_share_of_the_newton_step_and_then_its_margins_at_the_new_price(window: int, share: float) -> None:
    first, second, gamma0, tau = [0.3, -1.0, 2.0, 0.9], [1.5, 0.0, 2.5], 1.5, 0.6
    margin = build_margin("kl_dual", window=window, gamma0=gamma0, tau=tau, center=False)
    _, state = call(margin, first)
    old = priced(first, gamma0, tau)
    assert float(state.mu) == pytest.approx(old, abs=SOLVER_TOLERANCE)
    got, state = call(margin, second, state)
    mean, more, less = (sum(at_price(old + step, second, gamma0, tau)) / 3 for step in (0.0, 1e-5, -1e-5))
    new = old + share * (gamma0 - mean) / ((more - less) / 2e-5)
    assert abs(new - old) > 0.02 * share and 0 < new < gamma0 / tau
    assert float(state.mu) == pytest.approx(new, abs=1e-7)  # the slope is a central difference
    assert got == pytest.approx(at_price(new, second, gamma0, tau), abs=1e-7)
    assert got != pytest.approx(at_price(old, second, gamma0, tau), abs=1e-3)


@pytest.mark.parametrize(("second", "bound"), [(8.0, 0.0), (-60.0, 10.0)])
def test_the_price_stays_between_zero_and_gamma0_over_tau_after_a_jump_of_the_rewards(
    second: float, bound: float
) -> None:
    gamma0, tau, first = 4.0, 0.4, [3.7, 3.75]
    old = priced(first, gamma0, tau)
    mean, more, less = (sum(at_price(old + step, [second], gamma0, tau)) for step in (0.0, 1e-5, -1e-5))
    unheld = old + (gamma0 - mean) / ((more - less) / 2e-5)
    assert unheld < -1 or unheld > 11  # the whole Newton step leaves [0, γ0/τ]
    margin = build_margin("kl_dual", window=1, gamma0=gamma0, tau=tau, center=False)
    _, state = call(margin, first)
    got, state = call(margin, [second], state)
    assert float(state.mu) == bound
    assert got == pytest.approx(at_price(bound, [second], gamma0, tau), rel=1e-9)


def test_dual_finds_the_price_of_a_steady_stream_of_small_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = build_margin("kl_dual", gamma0=1.0, tau=0.5, center=False, window=256)
    state, recent = margin.init(), []
    for _ in range(300):
        got, state = call(margin, torch.randn(8, generator=generator, dtype=torch.float64).tolist(), state)
        recent += got
    mean = sum(recent[-1600:]) / 1600
    assert abs(mean - 1.0) < 0.03  # γ's standard deviation is about 0.3: four standard errors
    # μ of an infinite pool, by quadrature over h ~ N(0, 1)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    weight = torch.exp(-(grid**2) / 2)
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        gamma = torch.ones_like(grid)
        for _ in range(200):  # damped fixed point of log γ = μ - 2 σ(γ - h)
            gamma = torch.exp(0.5 * torch.log(gamma) + 0.5 * (middle - 2 * torch.sigmoid(gamma - grid)))
        low, high = (middle, high) if float((weight * gamma).sum() / weight.sum()) < 1 else (low, middle)
    assert float(state.mu) == pytest.approx(low, abs=0.1)


def test_the_authors_procedure_is_near_the_exact_solution_where_it_converges() -> None:
    h = [0.3, -1.0, 2.0, 0.9]
    got, state = call(build_margin("kl_authors", gamma0=4.0, tau=10.0, center=False), h)
    assert got == pytest.approx(oracle.kl_margins(h, 4.0, 10.0), abs=4e-5)
    assert state.reward_margin.tolist() == h


def test_the_authors_pool_is_the_batch_and_a_sample_of_the_past_that_repeats_with_its_seed() -> None:
    past = torch.linspace(-3, 3, 40).tolist()
    margins = [build_margin("kl_authors", gamma0=4.0, tau=10.0, center=False, sample=5, seed=s) for s in (0, 0, 1)]
    got = []
    for margin in margins:
        _, state = call(margin, past)
        pool, _ = margin.allocate(torch.tensor([0.5], dtype=torch.float64), random_evidence(1), state, Local())
        assert len(pool.score) == 6 and pool.score[0] == 0.5 and set(pool.score[1:].tolist()) <= set(past)
        got.append(pool.score.tolist())
    assert got[0] == got[1] != got[2]


def test_the_authors_sample_takes_other_places_of_a_full_queue_each_step() -> None:
    past = torch.linspace(-3, 3, 40).tolist()
    margin = build_margin("kl_authors", gamma0=4.0, tau=10.0, center=False, sample=5, memory=40)
    _, state = call(margin, past)
    places = []
    for h in (10.0, 11.0):
        queue = state.reward_margin.tolist()
        assert len(queue) == 40
        pool, state = margin.allocate(torch.tensor([h], dtype=torch.float64), random_evidence(1), state, Local())
        places.append([queue.index(score) for score in pool.score[1:].tolist()])
    assert places[0] != places[1]


def test_the_authors_queue_forgets_the_oldest() -> None:
    past = torch.linspace(-3, 3, 40).tolist()
    _, state = call(build_margin("kl_authors", center=False, sample=2, memory=3), past)
    assert state.reward_margin.tolist() == past[-3:]


def test_the_authors_queue_holds_the_newest_margins_oldest_first_over_steps() -> None:
    margin = build_margin("kl_authors", tau=2.0, center=False, sample=2, memory=5)
    state = margin.init()
    for h, queue in (
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([0.5, 0.25], [1.0, 2.0, 3.0, 0.5, 0.25]),
        ([0.75, 4.0, 0.1], [0.5, 0.25, 0.75, 4.0, 0.1]),
    ):
        _, state = call(margin, h, state)
        assert state.reward_margin.tolist() == queue


@pytest.mark.parametrize("bad", [0.0, -2.0, math.nan])
@pytest.mark.parametrize("name", ["column", "reverse", "shuffled"])
def test_a_number_that_one_rank_cannot_use_ends_both_with_its_message(name: str, bad: float) -> None:
    column = build_margin("column", transform="log")
    margin = column if name == "column" else build_margin(name, inner=column)
    numbers = torch.tensor([[1.0, 4.0], [2.0, bad]], dtype=torch.float64)
    said = []

    def step(ranks: Ranks) -> None:
        evidence = random_evidence(2)._replace(column=numbers[ranks.rank])
        with pytest.raises(DataError) as found:
            margin(torch.zeros(2, dtype=torch.float64), evidence, margin.init(), ranks)
        said.append(str(found.value))

    on_two_ranks(step)
    assert said[0] == said[1] and f"the margin column holds {bad}; allowed: finite numbers, > 0" in said[0]


def test_column_scales_the_data_and_refuses_what_it_cannot_use() -> None:
    evidence = random_evidence(2)._replace(column=torch.tensor([1.0, 4.0], dtype=torch.float64))
    h = torch.zeros(2, dtype=torch.float64)
    assert build_margin("column", scale=0.5)(h, evidence, ())[0].tolist() == [0.5, 2.0]
    logs, _ = build_margin("column", scale=0.5, transform="log")(h, evidence, ())
    assert logs.tolist() == pytest.approx([0.0, 0.5 * 1.3862943611198906])
    with pytest.raises(ConfigError, match=r"data.columns.margin"):
        build_margin("column")(h, random_evidence(2), ())
    with pytest.raises(DataError, match=r"holds 0.0.*> 0 with column.transform=log"):
        build_margin("column", transform="log")(h, evidence._replace(column=torch.tensor([0.0, 1.0])), ())


def evidence_with_gaps(policy: list[float], reference: list[float]) -> Any:
    """Evidence whose per-token gaps chosen - rejected are given; four tokens each."""

    def logps(gaps: list[float]) -> PairLogps:
        rejected = torch.full((len(gaps),), -8.0, dtype=torch.float64)
        lengths = torch.full((len(gaps),), 4)
        return PairLogps(rejected + 4 * torch.tensor(gaps, dtype=torch.float64), rejected, lengths, lengths)

    return random_evidence(len(policy))._replace(policy=logps(policy), reference=logps(reference))


def evidence_of_lengths(policy: list[tuple[float, float]], reference: list[tuple[float, float]]) -> Any:
    """Evidence with the given (chosen, rejected) sums; 2 and 8 tokens in the first pair, 10 and 4 in the others."""
    lengths = torch.tensor([(2, 8), *[(10, 4)] * (len(policy) - 1)]).T

    def logps(sums: list[tuple[float, float]]) -> PairLogps:
        return PairLogps(*torch.tensor(sums, dtype=torch.float64).T, *lengths)

    return Evidence(logps(policy), logps(reference))


def test_alpha_dpo_divides_each_completion_by_its_own_length() -> None:
    # per token: policy -3 - (-2) = -1 and -1 - (-4) = 3; reference -1 - (-1) = 0 and -2 - (-1) = -1; gaps -1 and 4
    evidence = evidence_of_lengths([(-6.0, -16.0), (-10.0, -16.0)], [(-2.0, -8.0), (-20.0, -4.0)])
    margin = build_margin("alpha_dpo", gamma0=0.5, alpha=0.1, beta=2.0)
    got, state = margin(torch.zeros(2, dtype=torch.float64), evidence, margin.init())
    assert got.tolist() == pytest.approx([0.5 - 0.2, 0.5 + 0.2], abs=1e-9)
    assert float(state.first / state.weight) == pytest.approx(1.5, abs=1e-12)  # mean of the gaps


def test_amapo_divides_each_completion_by_its_own_length() -> None:
    # per token: -3 - (-2) = -1, -1 - (-4) = 3, -2 - (-6) = 4: mean 2, deviations -3, 1, 2
    evidence = evidence_of_lengths([(-6.0, -16.0), (-10.0, -16.0), (-20.0, -24.0)], [(-1.0, -1.0)] * 3)
    got, _ = build_margin("amapo", beta=1.5)(torch.zeros(3, dtype=torch.float64), evidence, ())
    std = math.sqrt((9 + 1 + 4) / 3)
    assert got.tolist() == pytest.approx([1.5 * math.exp(3 / std * 2), 0.0, 0.0])


@pytest.mark.parametrize("name", ["alpha_dpo", "amapo"])
def test_what_counts_as_rounding_is_measured_on_the_log_probabilities_of_all_ranks(name: str) -> None:
    """Gaps 1e-4 apart: much beside log-probabilities of -8 per token, rounding beside -1e5 on the other rank."""
    margin = build_margin(name, beta=2.0)
    near = evidence_with_gaps([1.0, 1.0 + 1e-4], [0.0, 0.0])
    far = near._replace(
        policy=near.policy._replace(chosen=near.policy.chosen - 4e5, rejected=near.policy.rejected - 4e5)
    )
    alone = margin(torch.zeros(2, dtype=torch.float64), near, margin.init())[0].tolist()
    assert alone[0] != alone[1]

    def step(ranks: Ranks) -> list[float]:
        return margin(torch.zeros(2), (near, far)[ranks.rank], margin.init(), ranks)[0].tolist()

    assert on_two_ranks(step) == [[1.0 if name == "alpha_dpo" else 0.0] * 2] * 2


def test_alpha_dpo_corrects_its_running_statistics_so_that_one_sigma_reads_one_sigma_at_step_one() -> None:
    margin = build_margin("alpha_dpo", gamma0=0.5, alpha=0.1, beta=2.0, decay=0.99)
    evidence = evidence_with_gaps([1.0, 3.0], [0.0, 0.0])  # mean 2, standard deviation 1
    got, state = margin(torch.zeros(2, dtype=torch.float64), evidence, margin.init())
    assert got.tolist() == pytest.approx([0.5 - 0.2, 0.5 + 0.2], abs=1e-9)
    # second step: decayed weights 0.99·0.01 and 0.01 of batches with gaps {1, 3} and {5}
    got, _ = margin(torch.zeros(1, dtype=torch.float64), evidence_with_gaps([6.0], [1.0]), state)
    weights = [0.99 / 1.99, 1 / 1.99]
    mean = weights[0] * 2 + weights[1] * 5
    std = (weights[0] * 5 + weights[1] * 25 - mean**2) ** 0.5
    assert got.tolist() == pytest.approx([0.5 + 0.2 * (5 - mean) / std], abs=1e-9)


def test_amapo_gives_a_margin_only_below_the_mean() -> None:
    evidence = evidence_with_gaps([1.0, 3.0, 2.0], [0.0, 0.0, 0.0])
    got, _ = build_margin("amapo", beta=1.5)(torch.zeros(3, dtype=torch.float64), evidence, ())
    std = math.sqrt(2 / 3)
    assert got.tolist() == pytest.approx([1.5 * math.exp((2 - 1) / std * 2), 0.0, 0.0])
    same, _ = build_margin("amapo", beta=1.0)(
        torch.zeros(2, dtype=torch.float64), evidence_with_gaps([1.0, 1.0], [0, 0]), ()
    )
    assert same.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("gap", "count"), [(0.7, 6), (0.3, 31), (0.0, 3), (-0.1, 7), (2.9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_amapo_gives_no_margin_where_only_rounding_sets_gaps_apart(gap: float, count: int, dtype: torch.dtype) -> None:
    lengths = torch.arange(count) + 1
    rejected = -2.0 * lengths
    logps = PairLogps((rejected + gap * lengths).to(dtype), rejected.to(dtype), lengths, lengths)
    h = torch.zeros(count, dtype=dtype)
    assert build_margin("amapo", beta=2.0)(h, Evidence(logps), ())[0].tolist() == [0.0] * count


def test_amapo_stays_finite_however_far_a_pair_lags() -> None:
    # 99 gaps of 200 and one of 0: mean 198, (mean - d)/std = sqrt(99), exponent 1970 without its bound
    evidence = evidence_with_gaps([200.0] * 99 + [0.0], [0.0] * 100)
    got, _ = build_margin("amapo", beta=0.5)(torch.zeros(100, dtype=torch.float32), evidence, ())
    assert got[:99].tolist() == [0.0] * 99
    assert float(got[99]) == pytest.approx(0.5 * 485165195.41, rel=1e-6)


@pytest.mark.parametrize("name", sorted(set(MARGINS) - {"none"}))
def test_no_margin_can_be_bound_to_a_loss_that_compares_nothing(name: str) -> None:
    for loss in (SFT(), WithSFT(loss=SFT())):
        with pytest.raises(ConfigError, match=rf"the margin '{name}' is not allowed with the loss '{loss.name}'"):
            build_margin(name).bind(loss)
        assert NoMargin().bind(loss) == NoMargin()


@pytest.mark.parametrize("name", ["alpha_dpo", "amapo"])
def test_beta_is_that_of_the_loss_unless_told(name: str) -> None:
    evidence, h = evidence_with_gaps([1.0, 3.0], [0.0, 0.5]), torch.zeros(2, dtype=torch.float64)
    bound, told = build_margin(name).bind(build_loss("simpo", beta=7.0)), build_margin(name, beta=7.0)
    assert torch.equal(bound(h, evidence, bound.init())[0], told(h, evidence, told.init())[0])
    assert build_margin(name, beta=3.0).bind(build_loss("simpo", beta=7.0)) == build_margin(name, beta=3.0)


@pytest.mark.parametrize("name", ["alpha_dpo", "amapo"])
def test_beta_that_nothing_decides_is_refused(name: str) -> None:
    margin = build_margin(name)
    with pytest.raises(ConfigError, match=rf"{name}.beta is undecided: give beta, or bind"):
        call(margin, [1.0, 2.0])
    with pytest.raises(ConfigError, match=rf"{name}.beta is undecided: the loss 'orpo' has no beta"):
        margin.bind(build_loss("orpo"))


@pytest.mark.parametrize(
    "margin", [build_margin("alpha_dpo"), build_margin("amapo"), build_margin("map", units="logratio")]
)
def test_beta_is_not_taken_from_a_loss_that_changes_it_at_every_step(margin: Margin) -> None:
    changing = BetaDPO(loss=DPO())
    for loss in (changing, WPO(loss=changing), WeightedSum(losses=(changing, DPO()), weights=(1.0, 1.0))):
        for one in (margin, build_margin("reverse", inner=margin)):
            why = (
                rf"{margin.name}.beta is undecided: the loss '{loss.name}' has another beta at every step, so give one"
            )
            with pytest.raises(ConfigError, match=why):
                one.bind(loss)
        told = dataclasses.replace(margin, beta=0.3)
        assert told.bind(loss) == told


INTEGERS = [
    *[(part, option) for part, option in ((KL, "history"), (RecentPool, "history"), (SampledPool, "sample"))],
    *[(SampledPool, "memory"), (SampledPool, "seed"), (MirrorDescent, "steps"), (Dual, "window")],
    *[(KLDual, "window"), (KLAuthors, "sample"), (KLAuthors, "memory"), (KLAuthors, "seed")],
    *[(Shuffled, "seed"), (BetaDPO, "seed")],
]


@pytest.mark.parametrize("value", [300.0, 300.5, True, "300", None])
@pytest.mark.parametrize(("part", "option"), INTEGERS, ids=lambda value: getattr(value, "__name__", value))
def test_an_option_that_is_an_integer_refuses_all_else(part: type, option: str, value: object) -> None:
    assert getattr(part(**{option: 300}), option) == 300
    if (part, option, value) == (KL, "history", None):  # open
        return
    with pytest.raises(ConfigError, match=rf"{option}={value!r} is not allowed; allowed: an integer"):
        part(**{option: value})


@pytest.mark.parametrize("value", [5.0, True])
def test_a_history_of_an_ablation_and_the_steps_of_mirror_descent_are_integers(value: object) -> None:
    for name in ("reverse", "shuffled"):
        with pytest.raises(ConfigError, match=rf"{name}.history={value!r} is not allowed; allowed: an integer >= 1"):
            build_margin(name, inner=build_margin("column"), history=value)
    with pytest.raises(ConfigError, match=rf"steps={value!r} is not allowed; allowed: an integer >= 1"):
        mirror_descent_margins(torch.zeros(2), gamma0=1.0, tau=1.0, steps=value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kl", {"gamma0": 0.0}, r"kl.gamma0=0.0.*> 0"),
        ("kl", {"tau": -1.0}, r"kl.tau=-1.0.*> 0"),
        ("kl", {"history": -1}, r"kl.history=-1"),
        ("fixed", {"gamma": float("nan")}, r"fixed.gamma=nan"),
        ("alpha_dpo", {"beta": 0.0}, r"alpha_dpo.beta=0.0.*> 0"),
        ("map", {"budget": 0.0}, r"map.budget=0.0"),
        ("map", {"standardize": "minmax"}, r"map.standardize='minmax'.*raw, z, robust_z, quantile"),
        ("map", {"units": "nats"}, r"map.units='nats' is not allowed; allowed: reward, logratio"),
        ("map", {"beta": 0.1}, r"map.beta=0.1 is not allowed; allowed: nothing with map.units=reward"),
        ("alpha_dpo", {"gamma0": float("nan")}, r"alpha_dpo.gamma0=nan.*finite"),
        ("alpha_dpo", {"alpha": float("inf")}, r"alpha_dpo.alpha=inf.*finite"),
        ("amapo", {"beta": float("inf")}, r"amapo.beta=inf.*finite"),
        ("kl", {"gamma0": float("inf")}, r"kl.gamma0=inf.*finite"),
        ("kl_dual", {"tau": float("inf")}, r"kl_dual.tau=inf.*finite"),
        ("map", {"budget": float("inf")}, r"map.budget=inf.*finite"),
        ("map", {"beta": -0.1, "units": "logratio"}, r"map.beta=-0.1 .*> 0"),
    ],
)
def test_options_outside_their_range_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_margin(name, **options)


def test_margins_that_learn_nothing_from_the_training_split_start_as_they_are() -> None:
    for name in ("none", "fixed", "column", "kl", "kl_authors", "alpha_dpo"):
        margin = build_margin(name)
        assert not margin.needs_fit
        ours, plain = state_to_plain(margin.fit(reference_with_margins([1.0, 2.0]))), state_to_plain(margin.init())
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["none", "fixed", "column"])
def test_margins_without_open_options_are_the_same_with_every_loss(name: str) -> None:
    margin = build_margin(name)
    assert all(margin.bind(loss) is margin for loss in (DPO(), build_loss("simpo"), build_loss("orpo")))


def test_an_unknown_margin_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown margin 'lk'; allowed: .*fixed, kl, .*none, reverse"):
        build_margin("lk")


def test_every_margin_has_a_contract() -> None:
    contracts = [contract() for contract in MarginContract.__subclasses__()]
    assert {margin.name for contract in contracts for margin, _ in contract.margins()} == set(MARGINS)


def test_every_margin_says_its_name_formula_and_source() -> None:
    for name, margin in MARGINS.items():
        assert margin.name == name and margin.formula and margin.source

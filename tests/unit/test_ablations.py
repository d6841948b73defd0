"""Reverse and shuffled around every margin that has no pool of its own; the others are in test_margins.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gamma_po.errors import ConfigError
from gamma_po.margins import MARGINS, Fixed, Margin, NoMargin, build_margin
from gamma_po.ranks import Ranks
from gamma_po.state import NoState, state_from_plain, state_to_plain
from tests.contracts import on_two_ranks, random_evidence, rows_of
from tests.unit.test_margins import WITHOUT_POOL, call, with_column


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
@pytest.mark.parametrize("inner", [NoMargin(), Fixed(gamma=0.7)])
def test_ablations_of_a_margin_that_is_the_same_for_every_pair_are_that_margin(name: str, inner: Margin) -> None:
    margin = build_margin(name, inner=inner)
    got, state = call(margin, [0.3, -1.0, 2.0])
    assert got == call(inner, [0.3, -1.0, 2.0])[0]
    assert state == inner.init() == NoState()  # nothing to remember


def test_reverse_of_a_margin_without_a_pool_mirrors_ranks_among_this_steps_and_recent_margins() -> None:
    """One pair at a time: γ = column, history of three; ranked by γ itself, not by confidence."""
    assert "largest to the smallest score" in MARGINS["reverse"].formula
    margin, state = build_margin("reverse", inner=build_margin("column"), history=3), None
    got, numbers = [], [1.0, 5.0, 2.0, 4.0, 3.0]
    for number in numbers:
        evidence = random_evidence(1)._replace(column=torch.tensor([number], dtype=torch.float64))
        given, state = margin(torch.zeros(1), evidence, margin.init() if state is None else state)
        got.append(float(given))
    # pools {1}, {1 5}, {1 5 2}, {1 5 2 4}, {5 2 4 3}
    assert got == [1.0, 1.0, 2.0, 2.0, 4.0]
    assert state.target_margin.tolist() == [2.0, 4.0, 3.0]


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_one_pair_at_a_time_leaves_nothing_to_exchange_around_kl_without_a_history(name: str) -> None:
    """A pair alone has γ0, so that all recent margins are the same."""
    margin = build_margin(name, inner=build_margin("kl", gamma0=1.5, tau=0.5, center=False, history=0))
    state = margin.init()
    for h in (0.3, -2.0, 4.0):
        got, state = call(margin, [h], state)
        assert got == pytest.approx([1.5], abs=1e-12)


@pytest.mark.parametrize("inner", WITHOUT_POOL, ids=lambda inner: inner.name)
def test_reverse_keeps_the_mean_over_step_and_history_and_without_ties_the_margins_themselves(inner: Margin) -> None:
    h = torch.linspace(-2, 2, 7, dtype=torch.float64)
    evidence, before = with_column(7, 3), with_column(7, 4)
    margin = build_margin("reverse", inner=inner, history=256)
    past, state = inner(h.flip(0) + 0.3, before, inner.init())
    plain, _ = inner(h, evidence, state)
    _, state = margin(h.flip(0) + 0.3, before, margin.init())
    got, state = margin(h, evidence, state)
    pool = [*past.tolist(), *plain.tolist()]
    assert state.target_margin.tolist() == pytest.approx(pool, abs=1e-12)
    order = sorted(pool, reverse=True)  # by hand: ties share what their ranks receive
    shares = {v: [order[k] for k, own in enumerate(sorted(pool)) if own == v] for v in pool}
    means = {value: sum(share) / len(share) for value, share in shares.items()}
    assert got.tolist() == pytest.approx([means[value] for value in plain.tolist()], abs=1e-12)
    assert sum(means[value] for value in pool) == pytest.approx(sum(pool), abs=1e-9)


@pytest.mark.parametrize("inner", WITHOUT_POOL, ids=lambda inner: inner.name)
@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_ablations_with_a_history_of_their_own_see_all_ranks_and_resume(name: str, inner: Margin) -> None:
    margin, h = build_margin(name, inner=inner), torch.linspace(-2, 2, 6, dtype=torch.float64)
    first, second = with_column(6, 1), with_column(6, 2)
    _, state = margin(h, first, margin.init())
    whole, after = margin(h.flip(0), second, state)

    def step(ranks: Ranks) -> tuple[torch.Tensor, Any]:
        rows = torch.arange(6).chunk(2)[ranks.rank]
        _, state = margin(h[rows], rows_of(first, rows), margin.init(), ranks)
        again = state_from_plain(margin.init(), state_to_plain(state))
        return margin(h.flip(0)[rows], rows_of(second, rows), again, ranks)

    parts, states = zip(*on_two_ranks(step), strict=True)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    for one in states:
        torch.testing.assert_close(state_to_plain(one), state_to_plain(after), rtol=0, atol=1e-12)
    torch.testing.assert_close(state_to_plain(states[0]), state_to_plain(states[1]), rtol=0, atol=0)


def test_shuffled_without_a_pool_gives_recent_margins_by_its_own_seed_anew_each_step() -> None:
    h, evidence = torch.zeros(12), with_column(12, 0)
    margins = [build_margin("shuffled", inner=build_margin("column"), seed=seed) for seed in (0, 0, 1)]
    firsts, states = zip(*(margin(h, evidence, margin.init()) for margin in margins), strict=True)
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[0], firsts[2])
    assert sorted(firsts[0].tolist()) == pytest.approx(sorted(evidence.column.tolist()), abs=1e-6)
    assert firsts[0].tolist() != pytest.approx(evidence.column.tolist(), abs=1e-3)
    second, _ = margins[0](h, evidence, states[0])
    assert not torch.equal(second, firsts[0]) and int(states[0].steps) == 1


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_ablations_read_the_column_that_their_inner_margin_reads(name: str) -> None:
    assert build_margin(name, inner=build_margin("column")).reads_column
    assert not build_margin(name).reads_column


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_ablations_refuse_each_other_and_a_history_that_nothing_reads(name: str) -> None:
    for nested in ("reverse", "shuffled"):
        with pytest.raises(ConfigError, match=rf"{name}.inner='{nested}' is not allowed.*any but"):
            build_margin(name, inner=build_margin(nested))
    for inner in ("kl", "kl_authors", "map"):
        with pytest.raises(
            ConfigError, match=rf"{name}.history=9 .* nothing with '{inner}', which has a pool of its own"
        ):
            build_margin(name, inner=build_margin(inner), history=9)
    with pytest.raises(ConfigError, match=rf"{name}.history=9 .*'fixed', which has the same γ for every pair"):
        build_margin(name, inner=Fixed(), history=9)
    with pytest.raises(ConfigError, match=rf"{name}.history=0 is not allowed; allowed: an integer >= 1"):
        build_margin(name, inner=build_margin("column"), history=0)


@pytest.mark.parametrize("name", ["reverse", "shuffled"])
def test_a_column_that_the_inner_margin_cannot_take_is_found_before_training(name: str) -> None:
    column = torch.tensor([0.5, 2.0, -1.0, torch.nan])
    inner = build_margin("column", transform="log")
    assert build_margin(name, inner=inner).check_column(column) == inner.check_column(column) == 2
    assert build_margin(name, inner=build_margin("column")).check_column(column) == 3  # a negative gap is none
    assert build_margin(name, inner=build_margin("kl")).check_column(column) is None  # reads no column

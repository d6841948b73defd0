"""Pairs are cut by the tokens they really take, evenly, and every optimizer step keeps its pairs."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gamma_po.data.batching import WIDTHS, TokenCosts
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.loader import ShuffledBatches, TokenBatches
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError
from gamma_po.layouts import LAYOUTS
from gamma_po.objective import short_step_factor

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=9)
EVEN = 4 / 3  # longest first into the emptiest part: at most this times the best
GENERATOR = torch.Generator().manual_seed(0)
MANY = tuple((20 + 200 * torch.rand(203, generator=GENERATOR) ** 3).long().tolist())  # a few pairs are long


def some_pairs(count: int) -> list[TokenizedPair]:
    """Pairs of different lengths."""
    lengths = torch.randint(1, 30, (count, 3), generator=torch.Generator().manual_seed(1)).tolist()
    return [TokenizedPair(*(torch.ones(n, dtype=torch.int32) for n in three), False) for three in lengths]


def best_of_all_cuts(widths: list[int], count: int, padded: bool) -> int:
    """The least possible largest part, by trying every division: of the sorted pairs where rows are padded."""
    if padded:
        ordered = sorted(widths)
        cuts = combinations(range(1, len(ordered)), count - 1)
        parts = [[ordered[a:b] for a, b in pairwise([0, *cut, len(ordered)])] for cut in cuts]
        return min(max(2 * len(part) * max(part) for part in cut) for cut in parts)
    sums: list[tuple[int, ...]] = [(0,) * count]
    for width in widths:
        sums = list({tuple(sorted([*s[:i], s[i] + width, *s[i + 1 :]])) for s in sums for i in range(count)})
    return min(max(s) for s in sums)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tokens_counted_are_those_that_the_layout_makes(layout: str) -> None:
    pairs = some_pairs(7)
    costs = TokenCosts.of(pairs, layout)
    for rows in ([0], [3, 1], list(range(7))):
        parts = [[getattr(pairs[row], name) for row in rows] for name in ("prompt", "chosen", "rejected")]
        assert costs.total(rows) == LAYOUTS[layout](*parts, 0).input_ids.numel()
    assert WIDTHS.keys() == LAYOUTS.keys()


@given(widths=LENGTHS, count=st.integers(1, 4), padded=st.booleans())
def test_parts_hold_every_pair_once_and_the_largest_is_as_small_as_can_be(
    widths: list[int], count: int, padded: bool
) -> None:
    count = min(count, len(widths))
    costs = TokenCosts(tuple(widths), padded)
    parts = costs.balanced(list(range(len(widths))), count)
    assert len(parts) == count and all(parts)
    assert sorted(row for part in parts for row in part) == list(range(len(widths)))
    largest, best = max(costs.total(part) for part in parts), best_of_all_cuts(widths, count, padded)
    assert largest == best if padded else largest <= EVEN * best


@given(widths=LENGTHS, limit=st.integers(1, 1500), padded=st.booleans())
def test_no_part_exceeds_the_limit_but_a_pair_that_does_so_alone(widths: list[int], limit: int, padded: bool) -> None:
    costs, rows = TokenCosts(tuple(widths), padded), list(range(len(widths)))
    parts = costs.within(rows, limit)
    assert sorted(row for part in parts for row in part) == rows
    fits = max(widths) * (2 if padded else 1) <= limit
    assert (costs.too_long(limit) is None) == fits
    assert all(costs.total(part) <= limit or (len(part) == 1 and not fits) for part in parts)
    if costs.total(rows) <= limit:
        assert parts == [rows]
    elif padded and fits and 1 < len(parts) <= 5:
        assert best_of_all_cuts(widths, len(parts) - 1, padded) > limit  # fewer do not do


def batches(rank: int = 0, *, world_size: int = 2, window: int = 1, epoch: int = 0, **options: Any) -> TokenBatches:
    """Batches of 4 pairs on average, 3 per step and rank: 25 per epoch, the last step has one."""
    costs = options.pop("costs", TokenCosts(MANY, True))
    common = {"accumulate": 3, "window": window, "seed": 5, "rank": rank, "world_size": world_size, **options}
    sampler = TokenBatches(costs, 4, **common)
    sampler.set_epoch(epoch)
    return sampler


def rows_of(sampler: Any) -> list[list[int]]:
    """The rows of each batch."""
    return [[slot.index for slot in batch] for batch in sampler]


def steps_of(window: int, epoch: int = 0) -> list[list[list[int]]]:
    """For each optimizer step, the micro-batches of both ranks."""
    ranks = [rows_of(batches(rank, window=window, epoch=epoch)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(batches(window=window)) == 25
    return [ranks[0][i : i + 3] + ranks[1][i : i + 3] for i in range(0, 25, 3)]


def padding(steps: list[list[list[int]]]) -> float:
    """Tokens held per token needed."""
    held = sum(len(part) * max(MANY[row] for row in part) for step in steps for part in step)
    return held / sum(MANY[row] for step in steps for part in step for row in part)


def test_with_a_window_of_one_every_step_holds_the_pairs_it_holds_without() -> None:
    plain = [rows_of(ShuffledBatches(203, 4, seed=5, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(plain[0]) == 25
    for number, step in enumerate(steps_of(window=1)):
        expected = [row for rank in plain for batch in rank[3 * number : 3 * number + 3] for row in batch]
        assert sorted(row for part in step for row in part) == sorted(expected)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_step_has_the_same_number_of_pairs_and_every_epoch_the_same_of_all(window: int) -> None:
    for epoch in (0, 1):
        steps = steps_of(window, epoch)
        assert [sum(len(part) for part in step) for step in steps] == [24] * 8 + [8]
        rows = [row for step in steps for part in step for row in part]
        assert len(set(rows)) == len(rows) == 200
    assert steps_of(window, 0) != steps_of(window, 1)


def test_a_pair_weighs_the_same_in_its_step_whatever_it_meets() -> None:
    """Lightning's means: over the pairs of a micro-batch, then over micro-batches, then over ranks."""
    ranks = [list(batches(rank)) for rank in (0, 1)]
    assert len({len(batch) for batch in ranks[0]}) > 3
    for start in range(0, 25, 3):
        step = [batch for rank in ranks for batch in rank[start : start + 3]]
        pairs = sum(len(batch) for batch in step)
        for batch in step:
            scale = sum(slot.weight for slot in batch) / len(batch) * short_step_factor(start, 25, 3)
            share = scale / len(batch) / 3 / 2
            assert share == pytest.approx(1 / pairs, rel=1e-12)


@pytest.mark.parametrize(
    ("batch_idx", "number", "accumulate", "expected"),
    [
        (0, 4, 2, 1),
        (3, 4, 2, 1),
        (4, 5, 2, 2),
        (3, 5, 4, 1),
        (4, 5, 4, 4),
        (5, 7, 5, 2.5),
        (6, 7, 5, 2.5),
        (0, 3, 8, 8 / 3),
    ],
)
def test_the_last_step_of_an_epoch_is_a_mean_over_the_micro_batches_it_has(
    batch_idx: int, number: int, accumulate: int, expected: float
) -> None:
    assert short_step_factor(batch_idx, number, accumulate) == expected
    assert short_step_factor(batch_idx, float("inf"), accumulate) == 1


def test_grouping_saves_padding_and_evens_out_memory() -> None:
    plain = [rows_of(ShuffledBatches(203, 4, seed=5, rank=rank, world_size=2)) for rank in (0, 1)]
    at_random = [plain[0][i : i + 3] + plain[1][i : i + 3] for i in range(0, 25, 3)]
    within_steps, across_steps = steps_of(window=1), steps_of(window=100)
    assert padding(at_random) > 1.4 > padding(within_steps) > padding(across_steps) and padding(across_steps) < 1.1
    costs = TokenCosts(MANY, True)

    def largest(steps: list[list[list[int]]]) -> int:
        return max(costs.total(part) for step in steps for part in step)

    assert largest(within_steps) < 0.8 * largest(at_random)


def test_neither_steps_nor_micro_batches_come_in_order_of_length() -> None:
    steps = steps_of(window=100)[:-1]
    lengths = torch.tensor([[max(MANY[row] for row in part) for part in step] for step in steps])
    assert (lengths.double().mean(dim=1).diff() < 0).any() and (lengths.diff(dim=1) < 0).any()


def test_the_order_is_a_function_of_seed_epoch_and_rank() -> None:
    torch.manual_seed(1)
    first = rows_of(batches(window=3))
    torch.manual_seed(2)
    assert rows_of(batches(window=3)) == first
    assert rows_of(batches(window=3, seed=6)) != first != rows_of(batches(1, window=3))


@pytest.mark.parametrize("skip", [0, 1, 3, 7, 24, 25])
def test_skipping_gives_the_rest_of_the_epoch(skip: int) -> None:
    whole = list(batches(window=3))
    sampler = batches(window=3)
    sampler.skip = skip
    assert list(sampler) == whole[skip:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_window": 0}, "data.length_window=0"),
        ({"max_tokens_per_forward": 0}, "data.max_tokens_per_forward=0"),
        ({"length_window": 2, "layout": "shared_prefix"}, "data.length_window=2 .*data.layout=shared_prefix"),
        ({"label_noise_seed": 3}, "data.label_noise_seed=3 is not used: data.label_noise=0.0"),
    ],
)
def test_options_that_cannot_work_or_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceDataModule(**options)
    assert PreferenceDataModule(label_noise=0.1, label_noise_seed=3).label_noise_seed == 3
    assert PreferenceDataModule(length_window=1, layout="shared_prefix").length_window == 1


def test_rows_of_any_object_with_three_parts_are_measured() -> None:
    pair = SimpleNamespace(prompt=[0] * 5, chosen=[0] * 3, rejected=[0] * 4)
    assert [TokenCosts.of([pair], layout).total([0]) for layout in ("padded", "packed", "shared_prefix")] == [
        18,
        17,
        12,
    ]

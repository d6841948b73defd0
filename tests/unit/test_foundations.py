"""Types, layouts, log-probabilities, schedules, files and the registry."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import gamma_po
from gamma_po.data.loader import ResumableLoader, SequentialBatches, ShuffledBatches
from gamma_po.errors import DataError
from gamma_po.files import locked, write_bytes
from gamma_po.layouts import padded_sequences
from gamma_po.schedules import warmup_then


def test_every_doctest_holds() -> None:
    tried = 0
    for info in pkgutil.walk_packages(gamma_po.__path__, "gamma_po."):
        if info.name != "gamma_po.__main__":
            result = doctest.testmod(importlib.import_module(info.name))
            assert result.failed == 0, info.name
            tried += result.attempted
    assert tried >= 15


def test_padded_predicts_each_completion_token_from_the_position_before_it() -> None:
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    completions = [torch.tensor([5]), torch.tensor([6, 7, 8, 9])]
    rows = padded_sequences(prompts, completions, pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 5, 0], [4, 6, 7, 8, 9]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert rows.predict_from.tolist() == [2, 5, 6, 7, 8]
    assert rows.targets.tolist() == [5, 6, 7, 8, 9]
    assert rows.sequence.tolist() == [0, 1, 1, 1, 1] and rows.lengths.tolist() == [1, 4]
    flat = rows.input_ids.flatten()
    assert flat[rows.predict_from + 1].equal(rows.targets)


def test_the_schedule_warms_up_linearly_and_follows_half_a_cosine_to_zero() -> None:
    factor = warmup_then("cosine", total_steps=100, warmup_ratio=0.1)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(55) == pytest.approx(0.5) and factor(100) == pytest.approx(0.0)
    assert factor(32) == pytest.approx((1 + math.cos(math.pi * 22 / 90)) / 2)
    assert [warmup_then("constant", total_steps=9, warmup_ratio=0.0)(step) for step in (0, 9)] == [1, 1]


def test_training_batches_of_all_ranks_together_are_each_pair_at_most_once() -> None:
    for epoch in (0, 1):
        seen: list[int] = []
        for rank in range(3):
            batches = ShuffledBatches(32, 5, seed=4, rank=rank, world_size=3)
            batches.set_epoch(epoch)
            lists = [[slot.index for slot in batch] for batch in batches]
            assert len(lists) == len(batches) == 2 and all(len(batch) == 5 for batch in lists)
            seen += [index for batch in lists for index in batch]
        assert len(set(seen)) == 30


def test_the_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    whole = [[s.index for s in batch] for batch in ShuffledBatches(32, 8, seed=4, rank=0, world_size=1)]
    halves = [
        [[s.index for s in batch] for batch in ShuffledBatches(32, 4, seed=4, rank=rank, world_size=2)]
        for rank in (0, 1)
    ]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]


def test_the_order_changes_with_epoch_and_seed_only() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = ShuffledBatches(32, 8, seed=seed, rank=0, world_size=1)
        batches.set_epoch(epoch)
        return [[slot.index for slot in batch] for batch in batches]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_a_data_set_smaller_than_a_global_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"7 pairs, fewer than one global batch of 4 × 2"):
        ShuffledBatches(7, 4, seed=0, rank=0, world_size=2)


def test_evaluation_batches_cover_every_pair_once_with_equally_many_batches_per_rank() -> None:
    lengths, weights, order = set(), [0.0] * 11, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10]
    for rank in range(2):
        batches = list(SequentialBatches(order, 3, rank=rank, world_size=2))
        lengths.add(tuple(len(batch) for batch in batches))
        for batch in batches:
            for slot in batch:
                weights[slot.index] += slot.weight
    assert len(lengths) == 1 and weights == [1.0] * 11


def test_a_loader_continues_where_its_state_says() -> None:
    def loader() -> ResumableLoader:
        batches = ShuffledBatches(20, 4, seed=0, rank=0, world_size=1)
        return ResumableLoader(range(20), batch_sampler=batches, collate_fn=list)

    class Rows:
        def __getitem__(self, slot: object) -> int:
            return slot.index  # type: ignore[attr-defined]

    first, second = loader(), loader()
    object.__setattr__(first, "dataset", Rows())
    object.__setattr__(second, "dataset", Rows())
    iterator = iter(first)
    head = [next(iterator), next(iterator)]
    second.load_state_dict(first.state_dict())
    tail, rest = list(second), list(iterator)
    assert tail == rest and len(head) + len(tail) == 5
    assert len(list(second)) == 5, "the next epoch is whole again"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_stops_no_work_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    done = []
    with locked(tmp_path / "some.lock"):
        done.append("work")
    assert done == ["work"] and "some.lock cannot be locked (no locks here)" in caplog.text

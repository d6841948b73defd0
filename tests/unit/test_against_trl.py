"""The benchmark against TRL: its rows, its meter and its ratios, and that it times nothing it has not checked."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.errors import DataError
from tests.tiny import tiny_rows, tiny_tokenizer, write_rows

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"
BATCH, STEPS = 4, 5
REPRESENTATIVE = 0.05  # relative, of tokens per pair


@pytest.fixture
def duel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark's files."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from duel import agreement, meter, ratios, rows, turns

    return SimpleNamespace(agreement=agreement, meter=meter, ratios=ratios, rows=rows, turns=turns)


def pool_lengths(duel: SimpleNamespace, count: int) -> list:
    """Lengths as skewed as those of real pairs."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(count, 3, generator=generator).mul(0.6).add(4.2).exp().long().clamp(4, 224)
    return [duel.rows.Lengths(*row) for row in numbers.tolist()]


# --- rows ---------------------------------------------------------------------------------------------------------


def test_all_arms_train_on_the_same_pairs_and_the_first_batch_comes_twice(duel: SimpleNamespace) -> None:
    lengths = pool_lengths(duel, 900)
    chosen = duel.rows.choose_rows(lengths, batch_size=BATCH, steps=STEPS, seed=0)
    warm_up = duel.rows.WARM_UP
    for batches in (chosen.shuffled, chosen.grouped):
        assert [len(batch) for batch in batches] == [BATCH] * (warm_up + STEPS)
        assert batches[warm_up - 1] == batches[warm_up]
    assert chosen.shuffled[0] == chosen.grouped[0]
    measured = [sorted(chain(*batches[warm_up:])) for batches in (chosen.shuffled, chosen.grouped)]
    assert measured[0] == measured[1] and len(set(measured[0])) == BATCH * STEPS
    assert [lengths[i].row for i in chosen.shuffled[0]] == sorted(pair.row for pair in lengths)[:BATCH]


def test_the_chosen_batches_are_as_long_and_as_padded_as_the_whole_file(duel: SimpleNamespace) -> None:
    lengths = pool_lengths(duel, 900)
    chosen = duel.rows.choose_rows(lengths, batch_size=BATCH, steps=STEPS, seed=0)
    measured = [i for batch in chosen.shuffled[duel.rows.WARM_UP :] for i in batch]

    def padded(order: list[int]) -> float:
        starts = range(0, len(order) - BATCH + 1, BATCH)
        return sum(max(lengths[i].row for i in order[s : s + BATCH]) for s in starts) * 2 / len(starts)

    real = [2 * p + c + r for p, c, r in lengths]
    at_random = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(5)).tolist()
    assert sum(real[i] for i in measured) / len(measured) == pytest.approx(sum(real) / len(real), rel=REPRESENTATIVE)
    assert padded(measured) == pytest.approx(padded(at_random), rel=2 * REPRESENTATIVE)
    grouped = [i for batch in chosen.grouped[duel.rows.WARM_UP :] for i in batch]
    assert padded(grouped) < 0.9 * padded(measured)


def test_a_file_with_too_few_pairs_is_refused(duel: SimpleNamespace) -> None:
    with pytest.raises(DataError, match=r"5 steps of 4 pairs need a file of at least 40 pairs, not 39"):
        duel.rows.choose_rows(pool_lengths(duel, 39), batch_size=BATCH, steps=STEPS, seed=0)


def test_the_data_module_takes_the_written_rows_in_the_chosen_order(duel: SimpleNamespace, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pool.jsonl", tiny_rows(60))
    pool, lengths = duel.rows.read_pool(str(source), tiny_tokenizer(), 1000)
    chosen = duel.rows.choose_rows(lengths, batch_size=BATCH, steps=STEPS, seed=0)
    path = tmp_path / "rows.jsonl"
    orders = duel.rows.write_rows(path, pool, chosen, batch_size=BATCH, seed=0)
    data = PreferenceDataModule(train=str(path), batch_size=BATCH, seed=0)
    data.tokenizer = tiny_tokenizer()
    data.setup("fit")
    written, _ = read_preferences(str(path), Columns())
    for step, batch in enumerate(data.train_dataloader()):
        assert tuple(batch.index.tolist()) == orders["shuffled"][step * BATCH : (step + 1) * BATCH]
        assert [written[i].chosen for i in batch.index] == [pool[i].chosen for i in chosen.shuffled[step]]
    grouped = [pool[i].rejected for batch in chosen.grouped for i in batch]
    assert [written[i].rejected for i in orders["grouped"]] == grouped


# --- meter --------------------------------------------------------------------------------------------------------


def test_counted_flops_are_two_per_multiplication_of_matrices_and_of_the_cpus_attention(duel: SimpleNamespace) -> None:
    inputs, weight = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    query, key, value = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    meter = duel.meter.Meter("cpu")
    meter.count_flops()
    (inputs @ weight).sum().backward()  # forward, and the weight's gradient
    assert meter.counted_flops() == 2 * 2 * 5 * 7 * 3
    meter.count_flops()
    torch.zeros(5, 3).addmm_(inputs, weight.detach())
    assert meter.counted_flops() == 2 * 5 * 7 * 3
    square = 2 * (2 * 3) * 16 * 16 * 8
    meter.count_flops()
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert meter.counted_flops() == 2 * square
    meter.count_flops()
    attended.sum().backward()
    assert meter.counted_flops() == 5 * square  # the scores again, and four gradients


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_since_the_reset(duel: SimpleNamespace) -> None:
    size, meter = 256 * 2**20, duel.meter.Meter("cpu")
    meter.reset_peak()
    before = meter.peak()
    torch.ones(size, dtype=torch.uint8)
    assert meter.peak() - before == pytest.approx(256, abs=16)
    meter.reset_peak()
    assert meter.peak() - before < 16


def test_a_step_costs_the_time_of_the_process_not_of_waiting(duel: SimpleNamespace) -> None:
    import time

    meter = duel.meter.Meter("cpu")
    meter.start()
    time.sleep(0.3)
    spent = meter.stop()
    assert spent.wall >= 0.3 and spent.cost < 0.1


# --- ratios -------------------------------------------------------------------------------------------------------


def steps(duel: SimpleNamespace, costs: list[float], rows: list[tuple[int, ...]]) -> list:
    """Steps of these costs."""
    return [duel.turns.Step(duel.turns.Facts(r, 0.7, 1, 1), cost, cost) for cost, r in zip(costs, rows, strict=True)]


def test_steps_on_the_same_batches_are_compared_one_by_one(duel: SimpleNamespace) -> None:
    batches = [(0, 1), (2, 3), (4, 5)]
    found = duel.ratios.time_ratio(steps(duel, [2.0, 9.0, 8.0], batches), steps(duel, [1.0, 3.0, 2.0], batches))
    assert found == (3.0, 2.0, 4.0)


def test_steps_on_other_batches_are_compared_all_together_per_pair(duel: SimpleNamespace) -> None:
    theirs = steps(duel, [2.0, 9.0, 7.0], [(5, 1), (2, 0), (4, 3)])
    ours = steps(duel, [1.0, 3.0], [(0, 1, 2), (3, 4, 5)])
    assert duel.ratios.time_ratio(theirs, ours) == (4.5, None, None)


def test_a_rival_is_timed_against_ours_of_its_own_group(duel: SimpleNamespace) -> None:
    costs = [("ours", 0, 2.0), ("best", 0, 6.0), ("ours", 1, 1.0), ("gpu-like", 1, 4.0)]
    results = [
        duel.ratios.Result(
            mode="full", name=n, group=g, steps=steps(duel, [c], [(0,)]), real_tokens=[3], peak=1.0, flops=1
        )
        for n, g, c in costs
    ]
    assert {ratio.rival: ratio.time.median for ratio in duel.ratios.ratios(results)} == {"best": 3.0, "gpu-like": 4.0}


def test_memory_is_compared_with_gradient_checkpointing_on_both_sides_or_on_none(duel: SimpleNamespace) -> None:
    peaks = {"ours": 40.0, "ours-checkpointing": 10.0, "defaults": 20.0, "best": 160.0}
    one = steps(duel, [1.0], [(0,)])
    results = [
        duel.ratios.Result(mode="lora", name=name, group=0, steps=one, real_tokens=[3], peak=peak, flops=1)
        for name, peak in peaks.items()
    ]
    found = {ratio.rival: ratio for ratio in duel.ratios.ratios(results)}
    assert {name: ratio.memory for name, ratio in found.items()} == {"defaults": 0.5, "best": 0.25}
    assert found["defaults"].time_target == 3.5 and found["best"].memory_target == 0.5


# --- agreement ----------------------------------------------------------------------------------------------------


def test_agreement_needs_equal_loss_and_gradient_at_weights_where_the_loss_is_not_ln_2(duel: SimpleNamespace) -> None:
    computed, gradient = duel.agreement.Computed, {"w": torch.ones(3), "v": torch.zeros(2)}
    ours = computed(0.75, gradient)

    def agrees(loss: float, scale: float) -> bool:
        theirs = computed(loss, {name: scale * value for name, value in gradient.items()})
        return duel.agreement.difference("best", ours, theirs).agrees

    assert agrees(0.75 + 5e-6, 1 + 5e-5)
    assert not agrees(0.75 + 5e-5, 1.0)
    assert not agrees(0.75, 1 + 5e-4)
    at_reference = computed(math.log(2), gradient)
    assert not duel.agreement.difference("best", at_reference, at_reference).agrees


def test_arms_that_differ_in_their_batches_only_are_checked_once(duel: SimpleNamespace) -> None:
    arms = ["defaults", "best", "grouped", "gpu-like", "gpu-like-grouped"]
    assert duel.agreement.distinct(arms) == ("defaults", "best", "gpu-like")


# --- the whole ----------------------------------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL (extra `parity`)")


def benchmark(model: str, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it on the tiny model."""
    data = write_rows(tmp_path / "pool.jsonl", tiny_rows(40))
    command = [sys.executable, str(FOLDER / "against_trl.py"), "--model", model, "--data", str(data)]
    command += ["--output", str(tmp_path / "out"), "--steps", "2", "--batch-size", "2", "--threads", "1"]
    path = os.pathsep.join([str(FOLDER.parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=500)


@needs_trl
def test_the_benchmark_agrees_times_and_writes_tables_and_a_plot(tiny_model_path: str, tmp_path: Path) -> None:
    done = benchmark(tiny_model_path, tmp_path, "--modes", "lora", "--arms", "gpu-like")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out" / "steps.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["arm"] for row in found] == ["ours"] * 2 + ["gpu-like"] * 2
    assert all(float(row["loss"]) == pytest.approx(math.log(2), abs=0.05) for row in found)
    ours, theirs = found[:2], found[2:]
    assert [row["completion_tokens"] for row in ours] == [row["completion_tokens"] for row in theirs]
    with (tmp_path / "out" / "ratios.csv").open() as file:
        (ratio,) = csv.DictReader(file)
    each = [float(b["seconds"]) / float(a["seconds"]) for a, b in zip(ours, theirs, strict=True)]
    assert float(ratio["time_ratio_min"]) == pytest.approx(min(each))
    assert (tmp_path / "out" / "against_trl.png").stat().st_size > 0


@needs_trl
def test_the_benchmark_times_nothing_where_the_sides_disagree(tiny_model_path: str, tmp_path: Path) -> None:
    options = ("--modes", "full", "--arms", "best", "--ours=--model.loss.beta 0.11")
    done = benchmark(tiny_model_path, tmp_path, *options)
    assert done.returncode == 1 and "nothing is timed" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "out" / "steps.csv").exists()

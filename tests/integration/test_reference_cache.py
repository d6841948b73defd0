"""The reference is scored once for what it depends on, and never again; a bad disk never spoils a run."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gamma_po.data import reference_cache
from gamma_po.data.dataset import PairDataset, collate
from gamma_po.data.reference_cache import ReferenceKey, Score, cached_logps
from gamma_po.policies import CompletionScorer
from gamma_po.ranks import Local
from gamma_po.types import PairLogps, PreferenceBatch
from tests import oracle
from tests.contracts import tiny_dataset
from tests.runs import run, steps_of
from tests.tiny import tiny_model

LOGP_TOLERANCE = 1e-4  # nats per sequence, float32 against float64
SPLITS = 3
STEP = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records how many pairs each pass over a data set really scored."""
    passes: list[int] = []
    compute = reference_cache._compute

    def counting(pairs: Any, *rest: Any) -> PairLogps:
        passes.append(len(pairs))
        return compute(pairs, *rest)

    monkeypatch.setattr(reference_cache, "_compute", counting)
    return passes


def cache_files(tmp_path: Path) -> list[Path]:
    """The files of the reference cache."""
    return sorted((tmp_path / "cache" / "gamma_po" / "reference").iterdir())


def test_other_hyper_parameters_reuse_the_cache(
    scored: list[int], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    run("fit", tiny_model_path, tiny_data, tmp_path, STEP)
    assert sorted(scored) == [10, 11, 32]
    scored.clear()
    for change in (
        ["--model.loss.beta", "0.7", "--model.margin", "Map", "--model.optimizer.lr", "0.1", "--seed_everything", "5"],
        ["--model.loss", "IPO", "--model.lora.r", "4", "--data.label_noise", "0.5"],
        ["--data.batch_size", "8", "--data.eval_batch_size", "2", "--trainer.accumulate_grad_batches", "2"],
    ):
        run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *change])
    assert scored == []
    assert len(cache_files(tmp_path)) == SPLITS


def test_other_weights_tokens_precision_or_attention_are_scored_anew(
    scored: list[int], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((Path(tiny_model_path) / name).read_bytes())
    for number, change in enumerate(
        (
            [],
            ["--model.policy.path", str(other)],
            ["--data.tokenization.max_completion_length", "6"],
            ["--model.policy.dtype", "bfloat16"],
            ["--trainer.precision", "bf16-mixed"],
            ["--model.policy.attention", "eager"],
        ),
        start=1,
    ):
        run("fit", tiny_model_path, tiny_data, tmp_path, [*STEP, *change])
        assert sorted(scored) == sorted([32, 10, 11] * number), change
    assert len(cache_files(tmp_path)) == 6 * SPLITS


def cached(dataset: PairDataset, folder: Path, calls: list[int] | None = None) -> PairLogps:
    """The cache around the tiny model, in batches of 5."""
    scorer = CompletionScorer(tiny_model())

    def score(batch: PreferenceBatch) -> PairLogps:
        if calls is not None:
            calls.append(batch.num_pairs)
        with torch.no_grad():
            return scorer(batch.model_input)

    @contextmanager
    def opened() -> Iterator[Score]:
        yield score

    return cached_logps(
        dataset.pairs, opened, key=ReferenceKey("w", "padded", "float32", "sdpa"), folder=folder, ranks=Local(),
        batch_size=5, collate=partial(collate, pad_id=0), description="test",
    )  # fmt: skip


def test_cached_values_are_those_of_a_naive_forward_in_the_order_of_the_pairs(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    dataset = tiny_dataset(tiny_data["test"])
    first, calls = cached(dataset, tmp_path), []
    again = cached(dataset, tmp_path, calls)
    assert calls == []
    chosen, rejected = oracle.pair_logps(oracle.double(tiny_model()), dataset.pairs)
    for logps in (first, again):
        torch.testing.assert_close(logps.chosen.double(), chosen, rtol=0, atol=LOGP_TOLERANCE)
        torch.testing.assert_close(logps.rejected.double(), rejected, rtol=0, atol=LOGP_TOLERANCE)
        assert logps.chosen_length.tolist() == [len(pair.chosen) for pair in dataset.pairs]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other tensors"])
def test_a_damaged_file_is_computed_anew_with_a_warning(
    damage: str, tiny_data: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = tiny_dataset(tiny_data["test"])
    whole = cached(dataset, tmp_path)
    (file,) = tmp_path.iterdir()
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-7])
        case "garbage":
            file.write_bytes(b"\x00garbage" * 50)
        case "empty":
            file.write_bytes(b"")
        case "other tensors":
            save_file({"chosen": torch.zeros(3)}, file)
    with caplog.at_level(logging.WARNING):
        again = cached(dataset, tmp_path)
    assert "is damaged" in caplog.text and str(file) in caplog.text
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    assert cached(dataset, tmp_path, calls := []).chosen.equal(whole.chosen) and calls == []


def test_leftovers_of_an_interrupted_write_do_not_count(tiny_data: dict[str, str], tmp_path: Path) -> None:
    dataset = tiny_dataset(tiny_data["test"])
    cached(dataset, tmp_path)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f".{file.name}.abc.partial")
    calls: list[int] = []
    cached(dataset, tmp_path, calls)
    assert sum(calls) == len(dataset) and len(load_file(file)["chosen"]) == len(dataset)


def test_a_disk_that_fills_up_while_scoring_costs_the_file_and_not_the_run(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    options = ["--trainer.limit_val_batches", "0"]
    expected = steps_of(run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir, "train/loss")
    for file in cache_files(tmp_path):
        file.unlink()

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reference_cache, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        folder = run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir
    assert "could not be saved" in caplog.text and "No space left on device" in caplog.text
    assert steps_of(folder, "train/loss") == expected and len(expected) == 8
    assert cache_files(tmp_path) == []


def test_a_write_that_fails_in_the_middle_leaves_nothing_behind(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: str, target: Path) -> None:
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr("gamma_po.files.os.replace", fails)
    cached(tiny_dataset(tiny_data["test"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_label_flips_neither_rescore_nor_mix_up_the_values(tiny_data: dict[str, str], tmp_path: Path) -> None:
    clean, noisy = tiny_dataset(tiny_data["test"]), tiny_dataset(tiny_data["test"], flips=(0, 3, 10))
    clean.reference = cached(clean, tmp_path)
    noisy.reference = cached(noisy, tmp_path, calls := [])
    assert calls == [] and len(list(tmp_path.iterdir())) == 1
    labelled = noisy.labelled_reference()
    flipped = torch.tensor([row in (0, 3, 10) for row in range(11)])
    assert torch.equal(labelled.margin, torch.where(flipped, -1, 1) * clean.reference.margin)
    assert torch.equal(labelled.chosen_length[flipped], clean.reference.rejected_length[flipped])

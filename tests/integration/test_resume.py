"""A stopped run continues as if nothing had happened, bit for bit; its checkpoints hold no more than that takes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from gamma_po.errors import ConfigError
from gamma_po.fingerprints import sampled_fingerprint
from gamma_po.policies import ModelConfig, load_model, load_parts
from tests.runs import arguments, fit, run, steps_of
from tests.same import assert_identical
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer, write_rows

LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8", "--model.lora.dropout", "0.1"]
FULL: list[str] = []
TWO_EPOCHS = ["--trainer.max_epochs", "2", "--pair_recorder.every_n_steps", "1"]
EVERY_STEP = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint that a run with EVERY_STEP wrote after an optimizer step."""
    (path,) = (folder / "checkpoints").glob(f"*step={step}.ckpt")
    return path


def last_state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def rows_by_step(folder: Path) -> dict[str, list[int]]:
    """Which pairs the steps saw."""
    files = sorted((folder / "pairs").glob("step-*.parquet"))
    return {file.name: pq.read_table(file)["index"].to_pylist() for file in files}


def assert_same_ending(whole: Path, resumed: Path, steps_before: int) -> None:
    """The resumed run's losses, pairs and final state are those of the whole run."""
    expected = steps_of(whole, "train/loss")[steps_before:]
    assert len(expected) > 0 and steps_of(resumed, "train/loss") == expected
    seen = rows_by_step(resumed)
    assert seen == {name: rows for name, rows in rows_by_step(whole).items() if name in seen} and seen
    ending, other = last_state(whole), last_state(resumed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "margin_state", "global_step", "epoch"):
        assert_identical(ending[part], other[part], part)


@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
def test_a_run_resumed_anywhere_ends_with_the_same_bits(
    mode: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*mode, *TWO_EPOCHS, *EVERY_STEP]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    assert len(steps_of(whole, "train/loss")) == 16
    for step in (3, 8, 13):  # inside the first epoch, between the epochs, inside the second
        resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(checkpoint_at(whole, step))])
        assert_same_ending(whole, resumed, step)


def test_the_end_of_an_epoch_workers_and_accumulated_gradients_resume_exactly(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, *TWO_EPOCHS, "--trainer.accumulate_grad_batches", "2", "--data.num_workers", "2"]
    every_epoch = [*options, "--checkpoint.save_top_k", "-1"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, every_epoch)
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*every_epoch, "--ckpt_path", str(checkpoint_at(whole, 4))])
    assert_same_ending(whole, resumed, 4)
    often = [*options, *EVERY_STEP]
    whole = fit(tiny_model_path, tiny_data, tmp_path, often)
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*often, "--ckpt_path", str(checkpoint_at(whole, 3))])
    assert_same_ending(whole, resumed, 3)


def test_batches_cut_by_tokens_resume_exactly_and_only_with_the_same_settings(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Micro-batches of different numbers of pairs, some in several forwards, with dropout and workers."""
    options = [*LORA, *TWO_EPOCHS, *EVERY_STEP, "--trainer.accumulate_grad_batches", "2", "--data.num_workers", "2"]
    rows = tiny_rows(32)
    for row in rows[::5]:
        row["chosen"] += " and good" * 12
    options += ["--data.train", str(write_rows(tmp_path / "uneven.jsonl", rows))]
    options += ["--data.length_window", "2", "--data.max_tokens_per_forward", "250"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    counts = {len(rows) for rows in rows_by_step(whole).values()}
    assert len(steps_of(whole, "train/loss")) == 8 and len(counts) > 1
    for step in (1, 6):  # inside the first and the second epoch
        resume = [*options, "--ckpt_path", str(checkpoint_at(whole, step))]
        assert_same_ending(whole, fit(tiny_model_path, tiny_data, tmp_path, resume), step)
    for change, message in (
        (["--data.length_window", "1"], "length_window=2, this run has length_window=1"),
        (["--data.length_window", "null"], "length_window=2.*, this run has .*length_window=not set"),
        (["--trainer.accumulate_grad_batches", "4"], "=2, this run has accumulate_grad_batches=4: .* --resume anyway"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(tiny_model_path, tiny_data, tmp_path, [*resume, *change])


def test_another_number_of_accumulated_micro_batches_is_refused_also_between_epochs(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.max_epochs", "2", "--checkpoint.save_top_k", "-1", "--trainer.accumulate_grad_batches", "2"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    resume = [*options, "--ckpt_path", str(checkpoint_at(whole, 4))]
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2, this run has accumulate_grad_batches=1"):
        fit(tiny_model_path, tiny_data, tmp_path, [*resume, "--trainer.accumulate_grad_batches", "1"])
    last = str(whole / "checkpoints" / "last.ckpt")
    run("validate", tiny_model_path, tiny_data, tmp_path, ["--ckpt_path", last])  # evaluation takes no steps


BASES = {"no reference": ["--model.loss", "SimPO"], "adapters off": ["--model.reference", "adapters_off"]}


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_adapters_do_not_go_on_over_another_base_that_no_cached_reference_tells_apart(
    options: list[str],
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = [*options, "--model.lora.r", "4", *EVERY_STEP, "--pair_recorder.every_n_steps", "1"]
    options += ["--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "0"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    checkpoint = ["--ckpt_path", str(checkpoint_at(whole, 3))]
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    message = r"a base of other weights \(fingerprint \w{12} in training, \w{12} here\)"
    with pytest.raises(ConfigError, match=f"{message}.*model.policy.*--resume anyway"):
        fit(str(tmp_path / "other"), tiny_data, tmp_path, [*options, *checkpoint])
    for command, anyway in (("fit", ["--resume", "anyway"]), ("validate", [])):
        caplog.clear()
        run(command, str(tmp_path / "other"), tiny_data, tmp_path, [*options, *checkpoint, *anyway])
        assert re.search(message, caplog.text)
    moved = shutil.copytree(tiny_model_path, tmp_path / "moved")
    assert_same_ending(whole, fit(str(moved), tiny_data, tmp_path, [*options, *checkpoint]), 3)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("row", [0, -1])
def test_a_sampled_fingerprint_finds_a_change_in_each_weight_and_reads_what_is_not_loaded(
    name: str, row: int, tmp_path: Path
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 256}  # embedding and projections are looked at in part
    tiny_model(**wide).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    model, empty = load_model(config), load_parts(config)
    assert next(empty.parameters()).is_meta
    before = sampled_fingerprint(model)
    assert sampled_fingerprint(empty) == before == sampled_fingerprint(load_model(config))
    with torch.no_grad():
        model.state_dict()[name][row] += 1e-3
    assert sampled_fingerprint(model) != before


def test_a_limit_on_steps_resumes_exactly_and_one_that_lightning_would_miscount_is_refused(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "10", "--checkpoint.save_top_k", "-1"]
    options += ["--pair_recorder.every_n_steps", "1"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    resume = [*options, "--ckpt_path", str(checkpoint_at(whole, 8))]
    resumed = fit(tiny_model_path, tiny_data, tmp_path, resume)
    assert steps_of(resumed, "train/loss") == steps_of(whole, "train/loss")[8:]
    assert_identical(last_state(whole)["state_dict"], last_state(resumed)["state_dict"])
    with pytest.raises(ConfigError, match=r"max_steps=10 and trainer.max_epochs=2 are both set"):
        fit(tiny_model_path, tiny_data, tmp_path, [*resume, "--trainer.max_epochs", "2"])


def start(command: list[str], cache: Path) -> subprocess.Popen[str]:
    """Start `python -m gamma_po` as a user would, in a process group of its own.

    With the usual Ctrl-C: where the tests run in the background of a shell, it is ignored, also by what they start.
    """

    def with_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gamma_po", *command], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=with_ctrl_c,
    )  # fmt: skip


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> Path:
    """Wait until a file appears."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"{pattern} never appeared")


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_ends_with_the_same_bits(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--trainer.max_epochs", "12", "--pair_recorder.every_n_steps", "1"]
    command = ["fit", *arguments(tiny_model_path, tiny_data, tmp_path / "killed", options)]
    process = start(command, tmp_path / "killed-cache")
    wait_for("runs/run/*/pairs/step-000003.parquet", tmp_path / "killed", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    (killed,) = (tmp_path / "killed" / "runs" / "run").iterdir()
    checkpoint = killed / "checkpoints" / "interrupted.ckpt"
    assert process.returncode == 130
    assert f"to continue, repeat the command with --ckpt_path {checkpoint}" in errors
    assert "Traceback" not in errors
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 3 <= step < 96 and steps_of(killed, "train/loss") == steps_of(killed, "train/loss")[:step]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    assert steps_of(killed, "train/loss") == steps_of(whole, "train/loss")[:step]
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(checkpoint)])
    assert_same_ending(whole, resumed, step)


def test_ctrl_c_while_the_reference_is_scored_leaves_no_broken_cache(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Slowed down by a batch size of 1 on many pairs, so that the signal comes in the middle."""
    rows = write_rows(tmp_path / "many.jsonl", tiny_rows(1200))
    options = ["--data.train", str(rows), "--data.eval_batch_size", "1", "--trainer.max_steps", "2"]
    options += ["--trainer.limit_val_batches", "0"]
    process = start(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, options)], tmp_path / "cache")
    folder = tmp_path / "cache" / "gamma_po" / "reference"
    wait_for("cache/gamma_po/reference", tmp_path, process)  # made when the scoring starts
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in errors, errors[-3000:]
    assert [file for file in folder.rglob("*") if file.suffix not in (".safetensors", ".lock") and file.is_file()] == []
    fit(tiny_model_path, tiny_data, tmp_path, ["--data.train", str(rows), "--trainer.max_steps", "2"])
    shards = [load_file(file) for file in folder.glob("*/*.safetensors")]
    assert sum(len(shard["pairs"]) for shard in shards) == 1200 + 10 + 11  # every pair once


@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
def test_a_checkpoint_holds_plain_values_and_only_what_training_changes(
    mode: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*mode, "--model.reference", "copy"]  # the hardest case: the reference is in memory as weights
    state = last_state(fit(tiny_model_path, tiny_data, tmp_path, options))  # loads with weights_only
    names = list(state["state_dict"])
    assert not any("reference" in name for name in names)
    assert all(("lora_" in name) == bool(mode) for name in names) and names
    number = sum(tensor.numel() for tensor in state["state_dict"].values())
    widths = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    widths |= {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    adapters = 2 * 4 * sum(sum(shape) for shape in widths.values())  # two layers, r = 4
    assert number == (adapters if mode else 28832 + 320 * 32)  # the tied head is named twice

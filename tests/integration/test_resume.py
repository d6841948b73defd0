"""A stopped run continues as if nothing had happened, bit for bit; its checkpoints hold no more than that takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gamma_po.cli import run as run_command
from tests.runs import arguments, fit, run, steps_of

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


def assert_identical(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Equal to the last bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


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

"""What must be the same of a run in one process and of one in two, and of a run that went on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from gamma_po.__main__ import main
from tests.runs import steps_of

LOSS_TOLERANCE = 1e-5  # absolute, per pair and per metric
WEIGHT_TOLERANCE = 1e-4  # relative L2
METRICS = ("val/loss", "val/rewards/margins", "val/accuracy/policy", "val/logps/chosen")

PairsByStep = dict[int, dict[int, tuple[float, float]]]


def pairs_by_step(folder: Path) -> PairsByStep:
    """Step -> row -> (loss, γ), over the files of all ranks."""
    steps: PairsByStep = {}
    for file in sorted((folder / "pairs").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            steps.setdefault(row["step"], {})[row["index"]] = (row["loss"], row["target_margin"])
    return steps


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's policy folder: of the model, or of the adapter."""
    (file,) = (folder / "policy").glob("*.safetensors")
    return load_file(file)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds, in one file."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype by name."""
    return {name: (value.shape, value.dtype) for name, value in state.items()}


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


def assert_same_pairs(one: Path, two: Path, *, steps: int) -> None:
    """Every step has the same four pairs, with the same losses and margins."""
    expected, found = pairs_by_step(one), pairs_by_step(two)
    assert len(expected) == steps and expected.keys() == found.keys()
    for step, rows in expected.items():
        assert rows.keys() == found[step].keys() and len(rows) == 4
        for row, values in rows.items():
            assert found[step][row] == pytest.approx(values, abs=LOSS_TOLERANCE)


def assert_same_exported_weights(one: Path, two: Path) -> None:
    """The same names, shapes and dtypes, and nearly the same numbers."""
    expected, found = exported(one), exported(two)
    assert shapes(expected) == shapes(found)
    flat = [torch.cat([state[key].double().flatten() for key in sorted(state)]) for state in (expected, found)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < WEIGHT_TOLERANCE


def assert_same_validation(one: Path, two: Path, *, epochs: int, metrics: tuple[str, ...] = METRICS) -> None:
    """Each validation has the same means."""
    for metric in metrics:
        expected = steps_of(one, metric)
        assert len(expected) == epochs
        assert steps_of(two, metric) == pytest.approx(expected, abs=LOSS_TOLERANCE, rel=1e-5)


def assert_same_history(states: list[dict[str, Any]], one: Path) -> None:
    """Each process holds the same history of the margin, and one process alone has it, too.

    Args:
        states: of the margin, by process.
        one: the directory of the run in one process.
    """
    first, second = (state["reward_margin"] for state in states)
    assert torch.equal(first, second) and first.shape == (20,)
    alone = last_checkpoint(one)["margin_state"]["reward_margin"]
    torch.testing.assert_close(first, alone, rtol=0, atol=LOSS_TOLERANCE)


def assert_goes_on_with_the_same_bits(whole: Path, resumed: Path, *, behind: int) -> None:
    """Losses and pairs behind a step, and the exported weights, are those of the run that was left alone."""
    losses = steps_of(whole, "train/loss")
    assert len(losses) > behind and steps_of(resumed, "train/loss") == losses[behind:]
    before, after = pairs_by_step(whole), pairs_by_step(resumed)
    assert after and after == {step: rows for step, rows in before.items() if step > behind}
    assert_identical(exported(whole), exported(resumed))


def assert_exports_from_shards_what_training_exported(run: Path, output: Path) -> None:
    """The last checkpoint is a folder; `export` writes the bits that the processes brought together after training."""
    assert (run / "checkpoints" / "last.ckpt").is_dir()
    assert main(["export", "--policy", str(run), "--output", str(output), "--weights_only", "false"]) == 0
    (found,), (expected,) = (sorted(folder.glob("*.safetensors")) for folder in (output, run / "policy"))
    assert found.name == expected.name
    assert_identical(load_file(found), load_file(expected))


def assert_clipped_first_step(run: Path, *, norm: float) -> None:
    """A first step of SGD on clipped gradients has moved the adapters' B so far: B starts at 0, where A has none."""
    (first,) = (run / "checkpoints").glob("*step=1.ckpt")
    state = torch.load(first, weights_only=True)["state_dict"]
    moved = math.hypot(*(float(value.norm()) for name, value in state.items() if "lora_B" in name))
    assert moved == pytest.approx(norm, rel=1e-4)


def assert_adapters_only(one: Path, two: Path) -> None:
    """The last checkpoints hold the same adapters by name and shape, neither base nor reference."""
    expected, found = last_checkpoint(one), last_checkpoint(two)
    assert expected["trained_weights"] == found["trained_weights"]
    assert {key: value.shape for key, value in expected["state_dict"].items()} == {
        key: value.shape for key, value in found["state_dict"].items()
    }
    assert found["state_dict"] and all("lora_" in key for key in found["state_dict"])

"""An optimizer that keeps its state in 8 bits goes on from a checkpoint with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import fit
from tests.same import assert_goes_on_with_the_same_bits

pytest.importorskip("bitsandbytes")


def test_a_run_with_an_optimizer_of_8_bits_goes_on_with_the_same_bits(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "0.003"]
    options += ["--model.optimizer.min_8bit_size", "1000", "--trainer.max_steps", "3", "--data.validation", "null"]
    options += ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    options += ["--pair_recorder.every_n_steps", "1", "--model.warmup_ratio", "0"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    (checkpoint,) = (whole / "checkpoints").glob("*step=2.ckpt")
    (optimizer,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    kept = [value for state in optimizer["state"].values() for value in flat(state) if value.numel() > 256]
    assert sum(value.dtype == torch.uint8 for value in kept) > len(kept) / 2  # else it were no test of 8 bits
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(checkpoint)])
    assert_goes_on_with_the_same_bits(whole, resumed, behind=2)


def flat(state: dict[str, object]) -> list[torch.Tensor]:
    """The tensors of a weight's state; bitsandbytes puts those of 8 bits into a dictionary of their own."""
    inner = [tensor for value in state.values() if isinstance(value, dict) for tensor in flat(value)]
    return inner + [value for value in state.values() if isinstance(value, torch.Tensor)]

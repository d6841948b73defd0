"""Two processes that share the weights (FSDP2) do what one does; their checkpoints and exports are whole."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from gamma_po.errors import ConfigError
from gamma_po.policies import Lora, ModelConfig, attach_lora
from gamma_po.sharding import check_sharding, transformer_blocks
from gamma_po.state import state_to_plain
from tests.integration.test_ranks import OBJECTIVE
from tests.processes import two_processes
from tests.runs import arguments, fit, run, steps_of
from tests.same import (
    LOSS_TOLERANCE,
    METRICS,
    assert_adapters_only,
    assert_clipped_first_step,
    assert_exports_from_shards_what_training_exported,
    assert_goes_on_with_the_same_bits,
    assert_same_exported_weights,
    assert_same_history,
    assert_same_pairs,
    assert_same_validation,
    exported,
    pairs_by_step,
)
from tests.tiny import tiny_model

BF16_TOLERANCE = 0.005  # nats of the mean loss; bfloat16 keeps 8 bits
HALF_TOLERANCE = 0.001  # float16 keeps 11
MOVE_TOLERANCE = 1e-3  # relative L2 of how far the weights went
LR, CLIP, BF16_CLIP, CLIP_VALUE = 0.1, 0.05, 1.0, 0.002
COMMON = [*OBJECTIVE, "--model.optimizer.momentum", "0.5", "--trainer.gradient_clip_val", str(CLIP)]
COMMON += ["--trainer.max_epochs", "3", "--pair_recorder.every_n_steps", "1", "--checkpoint.save_top_k", "-1"]
COMMON += ["--model.warmup_ratio", "0"]
FULL = [*COMMON, "--checkpoint.every_n_train_steps", "12", "--report.enabled", "true", "--report.num_prompts", "2"]
LORA = [*COMMON, "--model.lora.r", "4", "--model.reference", "copy", "--data.layout", "shared_prefix"]
LORA += ["--checkpoint.every_n_train_steps", "1", "--model.gradient_checkpointing", "true"]
# Clipped so little that eight steps change the losses by much more than bfloat16 does.
EIGHT_STEPS = [*COMMON, "--trainer.max_epochs", "1", "--trainer.gradient_clip_val", str(BF16_CLIP)]
BF16 = [*EIGHT_STEPS, "--trainer.precision", "bf16-mixed"]
BF16_LORA = [*BF16, "--model.lora.r", "4", "--model.policy.dtype", "bfloat16"]
HALF = [*EIGHT_STEPS, "--trainer.precision", "16-true"]
# A margin without pools: those of KL are the micro-batches, which accumulation makes smaller.
BIG_BATCH = ["--model.loss.beta", "0.3", "--model.margin", "Fixed", "--model.margin.gamma", "0.5"]
BIG_BATCH += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1.0", "--model.warmup_ratio", "0"]
BIG_BATCH += ["--trainer.gradient_clip_val", str(CLIP_VALUE), "--trainer.gradient_clip_algorithm", "value"]
BIG_BATCH += ["--pair_recorder.every_n_steps", "1", "--data.batch_size", "8"]
IN_FOUR = ["--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2"]  # on each of two processes
STRATEGY = "--trainer.strategy"
HALVED = ["--trainer.devices", "2", "--data.batch_size", "2", "--data.eval_batch_size", "1"]
SHARDED = [*HALVED, STRATEGY, "ModelParallelStrategy", f"{STRATEGY}.data_parallel_size", "2"]
SHARDED += [f"{STRATEGY}.tensor_parallel_size", "1"]
SHARDED += ["--trainer.callbacks", "tests.integration.test_sharding.WhatEachHolds"]
ONE_FILE = [f"{STRATEGY}.save_distributed_checkpoint", "false"]
MIDDLE = 12  # steps: inside the second epoch of 8

SCRIPT = """
import glob, json, os, sys
from pathlib import Path
import pytest
from gamma_po.cli import PreferenceCLI
from tests.runs import draw_no_figures

draw_no_figures(pytest.MonkeyPatch())
for name, command in json.loads(Path(sys.argv[1]).read_text()).items():
    sys.argv[1:] = []
    os.environ["HELD"] = str(Path(os.environ["ROOT"]) / name)
    Path(os.environ["HELD"]).mkdir(exist_ok=True)
    PreferenceCLI([glob.glob(word[5:])[0] if word.startswith("glob:") else word for word in command])
"""


class WhatEachHolds(Callback):
    """Writes each process's margin history, share of the weights and dtypes; named on the command line."""

    def __init__(self) -> None:
        self.gathered_in: set[str] = set()
        self.rounded, self.first_move = False, math.nan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(block: nn.Module, inputs: object) -> None:
            self.gathered_in |= {str(parameter.dtype) for parameter in block.parameters()}

        transformer_blocks(pl_module.policy.model)[0].register_forward_pre_hook(note)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad.to_local() for p in pl_module.policy.parameters() if p.grad is not None]
        self.rounded = all(torch.equal(part, part.bfloat16().to(part.dtype)) for part in gradients)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == 1:  # B starts at 0
            adapters = [value for name, value in pl_module.named_parameters() if "lora_B" in name]
            self.first_move = math.hypot(*(float(value.detach().full_tensor().norm()) for value in adapters))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation embedding and head stay gathered until the next step
        parameters = list(pl_module.parameters())
        held = {
            "margin_state": state_to_plain(pl_module.margin_state),
            "all": sum(parameter.numel() for parameter in parameters),
            "here": sum(parameter.to_local().numel() for parameter in parameters),
            "gathered_in": self.gathered_in,
            "gradients_are_bfloat16": self.rounded,
            "first_move": self.first_move,
        }
        torch.save(held, Path(os.environ["HELD"]) / f"rank{trainer.global_rank}.pt")


class Runs(SimpleNamespace):
    """The directories of the runs in one process and in two, by name."""

    one: dict[str, Path]
    two: dict[str, Path]
    root: Path
    said: str


@pytest.fixture(scope="module")
def runs(tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file: one launch of two processes, and the same in this one."""
    root = tmp_path_factory.mktemp("sharding")
    # 11 rows, one at a time: the second process's last batch is empty.
    odd = ["--data.validation", tiny_data["test"]]
    methods = {"full": FULL, "lora": LORA, "bf16": BF16_LORA, "half": HALF, "big-batch": BIG_BATCH}
    one = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache-one"))
        patch.setattr("sys.argv", ["gamma_po"])
        for name, options in methods.items():
            one[name] = fit(
                tiny_model_path, tiny_data, root / "one" / name, [*options, *odd, "--data.eval_batch_size", "2"]
            )

        tested = [*FULL, "--data.eval_batch_size", "2", "--ckpt_path", str(one["full"] / "checkpoints" / "last.ckpt")]
        one["full-test"] = run("test", tiny_model_path, tiny_data, root / "one" / "full-test", tested).trainer_dir

    sharded = {name: [*options, *odd, *SHARDED] for name, options in methods.items()}
    sharded["big-batch"] += IN_FOUR
    sharded["lora"] += ONE_FILE
    for name in ("full", "lora"):
        start = f"glob:{root}/two/{name}/runs/run/*/checkpoints/*step={MIDDLE}.ckpt"
        sharded[f"{name}-resumed"] = [
            *sharded[name],
            "--ckpt_path",
            start,
            "--weights_only",
            str(name == "lora").lower(),
        ]
    last = f"glob:{root}/two/full/runs/run/*/checkpoints/last.ckpt"
    for command in ("test", "validate"):
        sharded[f"full-{command}"] = [*sharded["full"], "--ckpt_path", last, "--weights_only", "false"]
    sharded["ddp"] = [*LORA, *odd, *HALVED, STRATEGY, "ddp"]
    # Scored anew, when the policy is no longer its own reference: from a copy that is sharded, too.
    sharded["full-resumed"] += ["--data.cache_dir", str(root / "cache-resumed")]
    commands = {}
    for name, options in sharded.items():
        command = name.removeprefix("full-") if name in ("full-test", "full-validate") else "fit"
        commands[name] = [command, *arguments(tiny_model_path, tiny_data, root / "two" / name, options)]
    (root / "commands.json").write_text(json.dumps(commands))
    (root / "script.py").write_text(SCRIPT)
    said = two_processes(
        [str(root / "script.py"), str(root / "commands.json")], ROOT=str(root), XDG_CACHE_HOME=str(root / "cache-two")
    )
    two = {name: next((root / "two" / name / "runs" / "run").iterdir()) for name in sharded}
    return Runs(one=one, two=two, root=root, said=said)


def assert_in_bfloat16(one: Path, two: Path) -> None:
    """Losses and gradients are nearly those of one process; in these steps they change by a hundred times as much."""
    losses = steps_of(one, "train/loss")
    assert len(losses) == 8 and losses[0] - losses[-1] > 100 * BF16_TOLERANCE
    assert steps_of(two, "train/loss") == pytest.approx(losses, abs=BF16_TOLERANCE)
    assert steps_of(two, "train/grad_norm") == pytest.approx(steps_of(one, "train/grad_norm"), rel=0.02)


def assert_gathered_and_summed(root: Path, bf16: str, float32: str) -> None:
    """Mixed precision gathers weights in bfloat16 and sums gradients in float32; without it all is in float32."""
    for name, dtype in ((bf16, torch.bfloat16), (float32, torch.float32)):
        for rank in (0, 1):
            held = torch.load(root / name / f"rank{rank}.pt", weights_only=True)
            assert held["gathered_in"] == {str(dtype)} and not held["gradients_are_bfloat16"]


def assert_step_of_big_batch(one: Path, two: Path, start: Path) -> None:
    """Losses, norms before clipping and the way of the weights are the same; each step clips some gradient."""
    norms, weights = steps_of(one, "train/grad_norm"), load_file(start / "model.safetensors")
    # Were no element above the limit, the norm could not be above it times the root of their number.
    assert len(norms) == 4 and min(norms) > CLIP_VALUE * math.sqrt(sum(value.numel() for value in weights.values()))
    assert steps_of(two, "train/grad_norm") == pytest.approx(norms, rel=1e-4)
    assert steps_of(two, "train/loss") == pytest.approx(steps_of(one, "train/loss"), abs=LOSS_TOLERANCE)
    expected, found = pairs_by_step(one), pairs_by_step(two)  # of a step's last micro-batch
    assert expected.keys() == found.keys() and all(len(rows) == 4 for rows in found.values())
    for step, rows in found.items():
        assert all(expected[step][row] == pytest.approx(values, abs=LOSS_TOLERANCE) for row, values in rows.items())
    moves = [torch.cat([(exported(run)[k] - weights[k]).flatten() for k in weights]) for run in (one, two)]
    assert float((moves[0] - moves[1]).norm() / moves[0].norm()) < MOVE_TOLERANCE


@pytest.mark.parametrize(("name", "of_one"), [("full", "full"), ("lora", "lora"), ("ddp", "lora")])
def test_two_processes_see_the_losses_and_margins_of_one(runs: Runs, name: str, of_one: str) -> None:
    assert_same_pairs(runs.one[of_one], runs.two[name], steps=24)


@pytest.mark.parametrize(("name", "of_one"), [("full", "full"), ("lora", "lora"), ("ddp", "lora")])
def test_the_weights_that_the_first_process_exports_are_those_of_one(runs: Runs, name: str, of_one: str) -> None:
    assert_same_exported_weights(runs.one[of_one], runs.two[name])


def test_an_exported_policy_loads_in_one_process(runs: Runs) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs.two["full"] / "policy")
    weights = exported(runs.two["full"])
    assert "lm_head.weight" not in weights  # tied
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_each_process_holds_half_of_the_weights_and_the_whole_history_of_the_margin(runs: Runs, name: str) -> None:
    held = [torch.load(runs.root / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["here"] for rank in held] == [held[0]["all"] / 2] * 2  # policy and, with LoRA, the reference's copy
    assert_same_history([rank["margin_state"] for rank in held], runs.one[name])


@pytest.mark.parametrize("name", ["full", "lora"])
def test_validation_of_an_uneven_number_of_rows_counts_each_once(runs: Runs, name: str) -> None:
    assert_same_validation(runs.one[name], runs.two[name], epochs=3)


def test_the_gradient_is_clipped_by_the_norm_over_all_shards(runs: Runs) -> None:
    assert_clipped_first_step(runs.two["lora"], norm=LR * CLIP)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_resumed_from_shards_or_from_one_file_ends_with_the_same_bits(runs: Runs, name: str) -> None:
    whole, resumed = runs.two[name], runs.two[f"{name}-resumed"]
    checkpoints = {path.name: path.is_dir() for path in (whole / "checkpoints").glob("epoch*")}
    assert set(checkpoints.values()) == {name == "full"}
    assert_goes_on_with_the_same_bits(whole, resumed, behind=MIDDLE)


def test_a_test_from_shards_gives_the_metrics_of_one_process(runs: Runs) -> None:
    metrics = tuple(metric.replace("val/", "test/") for metric in METRICS)
    assert_same_validation(runs.one["full-test"], runs.two["full-test"], epochs=1, metrics=metrics)


def test_a_validation_from_shards_gives_the_metrics_of_one_process_from_the_same_weights_in_one_file(
    runs: Runs, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    shards = runs.two["full"] / "checkpoints" / "last.ckpt"
    dcp_to_torch_save(shards, tmp_path / "weights.pt")  # torch's own way to bring them together
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)["state_dict"]
    beside = torch.load(shards / "meta.pt", weights_only=True)
    torch.save({**beside, "state_dict": weights}, tmp_path / "one.ckpt")
    options = [*FULL, "--data.validation", tiny_data["test"], "--data.eval_batch_size", "2"]
    options += ["--ckpt_path", str(tmp_path / "one.ckpt")]
    one = run("validate", tiny_model_path, tiny_data, tmp_path, options).trainer_dir
    assert_same_validation(one, runs.two["full-validate"], epochs=1)
    last = steps_of(runs.two["full"], "val/loss")[-1]  # of the training, at the same step
    assert steps_of(one, "val/loss") == pytest.approx([last], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["full", "bf16"])
def test_export_brings_shards_together(runs: Runs, name: str, tmp_path: Path) -> None:
    assert_exports_from_shards_what_training_exported(runs.two[name], tmp_path / "out")


def test_a_checkpoint_of_adapters_holds_neither_base_nor_reference(runs: Runs) -> None:
    assert_adapters_only(runs.one["lora"], runs.two["lora"])


def test_in_bfloat16_base_and_adapters_of_two_dtypes_are_sharded_together(runs: Runs) -> None:
    assert_in_bfloat16(runs.one["bf16"], runs.two["bf16"])
    assert_gathered_and_summed(runs.root, "bf16", "full")
    held = torch.load(runs.root / "bf16" / "rank0.pt", weights_only=True)
    assert held["first_move"] == pytest.approx(LR * BF16_CLIP, rel=1e-4)  # clipped by the norm over all shards


def test_float16_weights_train_as_in_one_process(runs: Runs) -> None:
    losses, found = (steps_of(of["half"], "train/loss") for of in (runs.one, runs.two))
    assert losses[0] - losses[-1] > 100 * HALF_TOLERANCE
    assert found == pytest.approx(losses, abs=HALF_TOLERANCE)
    norms = [steps_of(of["half"], "train/grad_norm") for of in (runs.one, runs.two)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    for folder in (runs.one["half"], runs.two["half"]):
        assert all(value.isfinite().all() and value.dtype == torch.float16 for value in exported(folder).values())
    held = torch.load(runs.root / "half" / "rank1.pt", weights_only=True)
    assert held["gathered_in"] == {"torch.float16"} and held["here"] == held["all"] / 2


def test_micro_batches_on_two_processes_make_the_step_of_one_big_batch_clipped_by_value(
    runs: Runs, tiny_model_path: str
) -> None:
    assert_step_of_big_batch(runs.one["big-batch"], runs.two["big-batch"], Path(tiny_model_path))


def test_samples_are_left_out_with_a_message_and_the_pairs_are_reported(runs: Runs) -> None:
    one, two = (json.loads((folder["full"] / "report.json").read_text()) for folder in (runs.one, runs.two))
    assert two["pairs"]["num_pairs"] == 11 and two["samples"] is None and one["samples"] is not None
    assert two["pairs"]["accuracy_policy"]["mean"] == pytest.approx(one["pairs"]["accuracy_policy"]["mean"])
    reports = ("full", "full-resumed", "full-test")
    assert runs.said.count("no samples: generation under ModelParallelStrategy is not supported") == len(reports)


def test_what_cannot_be_sharded_is_refused_with_what_is_allowed() -> None:
    here = {"processes": 2, "tensor_parallel": 1}
    config = ModelConfig(path="anything")
    check_sharding(config, "bf16-mixed", **here)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 1 and data_parallel_size: 4"):
        check_sharding(config, "32-true", processes=4, tensor_parallel=4)
    with pytest.raises(ConfigError, match=r"precision.*16-mixed.*bf16-mixed"):
        check_sharding(config, "16-mixed", **here)
    with pytest.raises(ConfigError, match=r"quantization=nf4.*cannot be sharded"):
        check_sharding(SimpleNamespace(quantization="nf4"), "32-true", **here)


def test_blocks_are_found_through_adapters_and_a_model_without_blocks_is_refused() -> None:
    model = tiny_model()
    layers = list(model.model.layers)
    assert transformer_blocks(model) == layers
    assert transformer_blocks(attach_lora(model, Lora(r=2), seed=0)) == layers
    bare = tiny_model()
    bare.model.layers, bare._no_split_modules = nn.ModuleList(), None
    with pytest.raises(ConfigError, match=r"llama does not say.*ddp"):
        transformer_blocks(bare)


def test_a_sharded_checkpoint_is_loaded_only_where_its_author_is_trusted(
    runs: Runs, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    shards = str(runs.two["full"] / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="--weights_only false"):
        fit(tiny_model_path, tiny_data, tmp_path, [*FULL, *SHARDED, "--ckpt_path", shards])
    with pytest.raises(ConfigError, match=r"allowed with it: trainer\.strategy: ModelParallelStrategy"):
        fit(tiny_model_path, tiny_data, tmp_path, [*FULL, "--ckpt_path", shards, "--weights_only", "false"])

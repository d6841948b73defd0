"""Two processes that share the weights in the older way (FSDP1) do what one does; Lightning has it on GPUs only.

Here a strategy derived from Lightning's, which its check for a GPU does not know, runs the same code on the CPU.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.optim import Optimizer

from gamma_po.checkpoints import load_plain_files_only
from gamma_po.errors import ConfigError
from gamma_po.flat_sharding import check_flat_sharding, is_flat
from gamma_po.inspection.cost import Memory, parameter_bytes
from gamma_po.inspection.flat import flat_share, flat_tensors
from gamma_po.inspection.sharded import copy_bytes
from gamma_po.policies import Lora, ModelConfig, attach_lora
from gamma_po.scorer import CompletionScorer
from gamma_po.state import state_to_plain
from tests.integration.test_sharding import (
    BF16,
    BIG_BATCH,
    CLIP,
    COMMON,
    HALVED,
    IN_FOUR,
    LR,
    MIDDLE,
    SCRIPT,
    STRATEGY,
    assert_gathered_and_summed,
    assert_in_bfloat16,
    assert_step_of_big_batch,
)
from tests.processes import torchrun, two_processes
from tests.runs import arguments, fit, steps_of
from tests.same import (
    assert_adapters_only,
    assert_clipped_first_step,
    assert_exports_from_shards_what_training_exported,
    assert_goes_on_with_the_same_bits,
    assert_same_exported_weights,
    assert_same_history,
    assert_same_pairs,
    assert_same_validation,
    exported,
)
from tests.tiny import tiny_model

SHARE = 0.75  # of the whole model: half of the weights, and what one block takes until it is shared
EPOCHS, STEPS = 2, 16
WHOLE = [*COMMON, "--trainer.max_epochs", str(EPOCHS), "--checkpoint.every_n_train_steps", "4"]
LORA = ["--model.lora.r", "4", "--data.layout", "shared_prefix", "--model.gradient_checkpointing", "true"]
SHORT = [*COMMON, "--trainer.max_steps", "4", "--checkpoint.every_n_train_steps", "1"]
METHODS = {
    "full": [*WHOLE, "--report.enabled", "true", "--report.num_prompts", "2"],
    "copy": [*WHOLE, *LORA, "--model.reference", "copy"],
    "adapters_off": [*SHORT, *LORA, "--model.reference", "adapters_off"],
    "bf16": BF16,
    "big-batch": BIG_BATCH,
}
SHARDS = [f"{STRATEGY}.state_dict_type", "sharded"]
FLAT = [*HALVED, STRATEGY, "tests.integration.test_flat_sharding.FSDPStrategyOnCPU"]
FLAT += [f"{STRATEGY}.state_dict_type", "full"]
FLAT += ["--trainer.callbacks", "tests.integration.test_flat_sharding.WhatEachHolds"]


class FSDPStrategyOnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself without a GPU."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Leave gathered weights where they are: moved from the CPU to the CPU, they would be freed."""
        with patch.object(FlatParamHandle, "to_cpu", lambda handle: nullcontext()):
            return super().lightning_module_state_dict()


class WhatEachHolds(Callback):
    """Writes each process's margin history, share of the weights and dtypes; named on the command line."""

    def __init__(self) -> None:
        self.gathered_in: set[str] = set()
        self.rounded = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(block: torch.nn.Module, inputs: object) -> None:
            self.gathered_in |= {str(parameter.dtype) for parameter in block.parameters()}

        block = next(unit for unit in pl_module.policy.module.modules() if is_flat(unit))
        block.module.register_forward_pre_hook(note)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in pl_module.policy.parameters() if p.grad is not None]
        self.rounded = all(torch.equal(part, part.bfloat16().to(part.dtype)) for part in gradients)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = {
            "margin_state": state_to_plain(pl_module.margin_state),
            "here": sum(parameter.numel() for parameter in pl_module.policy.parameters()),
            "gathered_in": self.gathered_in,
            "gradients_are_bfloat16": self.rounded,
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
    root = tmp_path_factory.mktemp("flat")
    odd = ["--data.validation", tiny_data["test"]]  # 11 rows, one at a time: the second process's last batch is empty
    one = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache-one"))
        patch.setattr("sys.argv", ["gamma_po"])
        for name, options in METHODS.items():
            alone = [*options, *odd, "--data.eval_batch_size", "2"]
            one[name] = fit(tiny_model_path, tiny_data, root / "one" / name, alone)
    sharded = {name: [*options, *odd, *FLAT] for name, options in METHODS.items()}
    sharded["full"] += SHARDS
    sharded["big-batch"] += IN_FOUR
    sharded["shards"] = [*COMMON, "--trainer.max_steps", "2", *LORA, "--model.reference", "copy", *FLAT, *SHARDS]
    for name in ("full", "copy"):
        start = f"glob:{root}/two/{name}/runs/run/*/checkpoints/*step={MIDDLE}.ckpt"
        trusted = ["--weights_only", str(name == "copy").lower()]
        sharded[f"{name}-resumed"] = [*sharded[name], "--ckpt_path", start, *trusted]
    commands = {
        name: ["fit", *arguments(tiny_model_path, tiny_data, root / "two" / name, options)]
        for name, options in sharded.items()
    }
    (root / "commands.json").write_text(json.dumps(commands))
    (root / "script.py").write_text(SCRIPT)
    said = two_processes(
        [str(root / "script.py"), str(root / "commands.json")], ROOT=str(root), XDG_CACHE_HOME=str(root / "cache-two")
    )
    two = {name: next((root / "two" / name / "runs" / "run").iterdir()) for name in sharded}
    return Runs(one=one, two=two, root=root, said=said)


EXACT = {"full": STEPS, "copy": STEPS, "adapters_off": 4}  # name to steps


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_see_the_losses_margins_and_gradients_of_one(runs: Runs, name: str) -> None:
    assert_same_pairs(runs.one[name], runs.two[name], steps=EXACT[name])
    norms = steps_of(runs.one[name], "train/grad_norm")
    assert min(norms) > CLIP  # every step is clipped
    assert steps_of(runs.two[name], "train/grad_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_the_weights_that_the_first_process_exports_are_those_of_one(runs: Runs, name: str) -> None:
    assert_same_exported_weights(runs.one[name], runs.two[name])


def test_each_process_holds_its_part_of_the_weights_and_the_whole_history_of_the_margin(runs: Runs) -> None:
    first, second = (torch.load(runs.root / "full" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    whole = sum(value.numel() for value in exported(runs.two["full"]).values())  # tied weights once
    assert first["here"] + second["here"] == whole
    assert first["here"] == pytest.approx(whole / 2, rel=0.01)  # flat tensors are filled up to even lengths
    assert_same_history([first["margin_state"], second["margin_state"]], runs.one["full"])


@pytest.mark.parametrize("name", ["full", "copy"])
def test_validation_of_an_uneven_number_of_rows_counts_each_once(runs: Runs, name: str) -> None:
    assert_same_validation(runs.one[name], runs.two[name], epochs=EPOCHS)


def test_the_gradient_is_clipped_by_the_norm_over_all_parts(runs: Runs) -> None:
    assert_clipped_first_step(runs.two["adapters_off"], norm=LR * CLIP)


@pytest.mark.parametrize("name", ["full", "copy"])
def test_a_run_resumed_from_shards_or_from_one_file_ends_with_the_same_bits(runs: Runs, name: str) -> None:
    whole, resumed = runs.two[name], runs.two[f"{name}-resumed"]
    checkpoints = {path.name: path.is_dir() for path in (whole / "checkpoints").glob("epoch*")}
    assert set(checkpoints.values()) == {name == "full"}
    assert_goes_on_with_the_same_bits(whole, resumed, behind=MIDDLE)


@pytest.mark.parametrize("name", ["full", "shards"])
def test_export_brings_shards_together(runs: Runs, name: str, tmp_path: Path) -> None:
    assert_exports_from_shards_what_training_exported(runs.two[name], tmp_path / "out")


def test_a_checkpoint_of_adapters_has_the_names_and_shapes_of_one_process(runs: Runs) -> None:
    assert_adapters_only(runs.one["copy"], runs.two["copy"])


def test_weights_gathered_in_bfloat16_give_nearly_the_same_losses(runs: Runs) -> None:
    assert_in_bfloat16(runs.one["bf16"], runs.two["bf16"])
    assert_gathered_and_summed(runs.root, "bf16", "full")


def test_micro_batches_on_two_processes_make_the_step_of_one_big_batch_clipped_by_value(
    runs: Runs, tiny_model_path: str
) -> None:
    assert_step_of_big_batch(runs.one["big-batch"], runs.two["big-batch"], Path(tiny_model_path))


PROBE = """
import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle

from gamma_po.flat_sharding import parameter_counts, shard_flat
from gamma_po.layouts import LAYOUTS
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_parts
from gamma_po.scorer import CompletionScorer

torch.distributed.init_process_group("gloo")
large, small, cases = sys.argv[1], ModelConfig(path=sys.argv[2]), json.loads(sys.argv[3])
place = f"{sys.argv[0]}.rank{torch.distributed.get_rank()}"
cpu = torch.device("cpu")


def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


Path("/proc/self/clear_refs").write_text("5")  # forgets the highest use so far
before = status("VmRSS")
scorer = shard_flat(CompletionScorer(load_parts(ModelConfig(path=large))), cpu, "32-true")
peak, (_, parameters) = status("VmHWM") - before, parameter_counts(scorer)
Path(f"{place}.read").write_text(f"{peak} {4 * parameters}")

allocate, prepare = FlatParamHandle._alloc_padded_unsharded_flat_param, _runtime_utils._get_reduce_scatter_tensors


def held(rank, precision, copied):
    model = load_parts(small)
    policy = shard_flat(CompletionScorer(attach_lora(model, Lora(r=rank), seed=0) if rank else model), cpu, precision)
    scorers = [policy]
    if copied:
        copy = shard_flat(CompletionScorer(load_parts(small)).requires_grad_(False), cpu, precision).eval()
        scorers = [copy, policy]
    handles = [[unit._handle for unit in FullyShardedDataParallel.fsdp_modules(scorer)] for scorer in scorers]
    gathered, summed = [], []

    def allocated(handle):
        tensor = allocate(handle)
        gathered.append(sum(h.flat_param._full_param_padded.untyped_storage().size() for h in sum(handles, [])))
        return tensor

    def reduced(state, gradient):
        summed.append(gradient.nbytes)
        return prepare(state, gradient)

    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    batch = LAYOUTS["padded"]([torch.arange(5)], [torch.arange(4)], [torch.arange(3)], 0)
    for step in range(2):
        if copied:
            with torch.no_grad():
                copy(batch)
        policy(batch).chosen.sum().backward()
        gradients = [handle.sharded_grad for handle in handles[-1]]
        optimizer.step()
        optimizer.zero_grad()
        FlatParamHandle._alloc_padded_unsharded_flat_param = allocated  # from the second step on
        _runtime_utils._get_reduce_scatter_tensors = reduced
    FlatParamHandle._alloc_padded_unsharded_flat_param = allocate
    _runtime_utils._get_reduce_scatter_tensors = prepare
    return {
        "weights": sum(handle.flat_param._local_shard.nbytes for handle in handles[-1]),
        "reference": sum(handle.flat_param._local_shard.nbytes for handle in handles[0]) if copied else 0,
        "gradients": sum(gradient.nbytes for gradient in gradients if gradient is not None),
        "optimizer": sum(state["momentum_buffer"].nbytes for state in optimizer.state.values() if state),
        "gathered": max(gathered),
        "summed": max(summed),
    }


Path(f"{place}.held").write_text(json.dumps({name: held(*case) for name, case in cases.items()}))
torch.distributed.destroy_process_group()
"""
SIZES = {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 51}
SMALL = {**SIZES, "num_hidden_layers": 4}  # numbers of weights that alignment and halves have to fill up
HELD: dict[str, tuple[int, str, bool]] = {  # rank of the adapters, precision, whether the reference is a copy
    "all weights": (0, "32-true", False),
    "adapters": (3, "32-true", False),
    "adapters, copy": (3, "32-true", True),
    "all weights, copy, gathered in bfloat16": (0, "bf16-mixed", True),
    "adapters, gathered in bfloat16": (3, "bf16-mixed", False),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have written what they held while they read a model, and trained another."""
    root = tmp_path_factory.mktemp("probe")
    tiny_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=16).save_pretrained(root / "large")  # 252 MB
    tiny_model(**SMALL).save_pretrained(root / "small")
    (root / "probe.py").write_text(PROBE)
    given = [str(root / "large"), str(root / "small"), json.dumps(HELD)]
    # Else the C library keeps what is freed between the parts that stay, and counts as much again.
    torchrun([str(root / "probe.py"), *given], MALLOC_MMAP_THRESHOLD_="262144")
    return root


def test_while_it_reads_a_model_no_process_holds_all_of_it(probed: Path) -> None:
    for rank in (0, 1):
        peak, whole = map(int, (probed / f"probe.py.rank{rank}.read").read_text().split())
        assert whole > 250e6 and peak < SHARE * whole, (peak, whole)


@pytest.mark.parametrize("case", HELD)
def test_a_process_holds_in_training_what_inspect_computes(case: str, probed: Path) -> None:
    lora, precision, copied = HELD[case]
    model, copy = tiny_model(**SMALL), CompletionScorer(tiny_model(**SMALL)).requires_grad_(False) if copied else None
    policy = CompletionScorer(attach_lora(model, Lora(r=lora), seed=0) if lora else model)
    trained = parameter_bytes(parameter for parameter in policy.parameters() if parameter.requires_grad)
    whole = Memory(parameter_bytes(policy.parameters()), copy_bytes(copy), trained, trained, 0, 0, 0)
    expected = whole.shared(flat_share(policy, copy, precision, 2))
    ranks = [json.loads((probed / f"probe.py.rank{rank}.held").read_text())[case] for rank in (0, 1)]
    for held in ranks:
        assert {name: held[name] for name in ("weights", "reference", "gradients", "gathered")} == {
            "weights": expected.weights,
            "reference": expected.reference,
            "gradients": expected.gradients,
            "gathered": expected.gathered,
        }
        assert held["summed"] == 4 * max(tensor.in_gradient for tensor in flat_tensors(policy, precision, 2))
    assert max(held["optimizer"] for held in ranks) == expected.optimizer
    assert sum(held["optimizer"] for held in ranks) == trained  # SGD's momentum; the frozen weights have none
    assert (expected.gradients > 2 * trained) == bool(lora)  # room for frozen weights beside the adapters


REFUSED = {
    "cpu_offload=True": {"cpu_offload": True},
    "sharding_strategy=": {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (1, 2)},
    "auto_wrap_policy=": {"auto_wrap_policy": {torch.nn.Linear}},
    "mixed_precision=": {"mixed_precision": MixedPrecision()},
    "activation_checkpointing_policy=": {"activation_checkpointing_policy": {torch.nn.Linear}},
    "use_orig_params=False": {"use_orig_params": False},
    "limit_all_gathers=False": {"limit_all_gathers": False},
}


@pytest.mark.parametrize("said", REFUSED)
def test_an_option_of_the_strategy_that_would_be_ignored_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match=f"FSDPStrategy with {said}.*allowed: "):
        check_flat_sharding(ModelConfig(path="anything"), FSDPStrategy(**REFUSED[said]), "32-true", processes=2)


def test_one_process_several_dtypes_and_half_precision_are_refused_with_what_is_allowed() -> None:
    strategy, config = FSDPStrategy(state_dict_type="sharded"), ModelConfig(path="anything")
    check_flat_sharding(config, strategy, "bf16-mixed", processes=2)
    with pytest.raises(ConfigError, match=r"precision.*bf16-true.*32-true, bf16-mixed"):
        check_flat_sharding(config, strategy, "bf16-true", processes=2)
    with pytest.raises(ConfigError, match=r"dtype=bfloat16.*FSDPStrategy.*float32.*ModelParallelStrategy"):
        check_flat_sharding(ModelConfig(path="anything", dtype="bfloat16"), strategy, "bf16-mixed", processes=2)
    with pytest.raises(ConfigError, match=r"quantization=nf4.*FSDPStrategy"):
        check_flat_sharding(SimpleNamespace(quantization="nf4", dtype="float32"), strategy, "32-true", processes=2)
    with pytest.raises(ConfigError, match=r"FSDPStrategy.*one process.*several devices"):
        check_flat_sharding(config, strategy, "32-true", processes=1)


UNPICKLED: list[str] = []


def notice(what: str) -> None:
    """Called by a checkpoint that is unpickled."""
    UNPICKLED.append(what)


class RunsCode:
    """An object whose unpickling is noticed."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return notice, ("code",)


def test_a_checkpoint_that_holds_code_is_refused_though_lightning_would_unpickle_it(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": RunsCode()}, tmp_path / "evil.ckpt")
    strategy = FSDPStrategyOnCPU()
    strategy.connect(LightningModule())
    strategy.load_checkpoint(tmp_path / "evil.ckpt", weights_only=True)
    assert UNPICKLED.pop() == "code"  # Lightning alone
    load_plain_files_only(strategy)
    with pytest.raises(ConfigError, match="can run code"):
        strategy.load_checkpoint(tmp_path / "evil.ckpt")
    assert not UNPICKLED

"""What only a CUDA device can show; skipped where there is none.

Cases that a CPU can run too, at a small size, are written for both: they have a device as parameter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from gamma_po import attention
from gamma_po.attention import Segments
from gamma_po.inspection.cost import parameter_bytes
from gamma_po.layouts import LAYOUTS
from gamma_po.losses import build_loss
from gamma_po.margins import MARGINS, build_margin, solve_kl_margins
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model
from gamma_po.scorer import CompletionScorer
from gamma_po.state import state_to_device
from tests.contracts import batch_of, random_evidence, tiny_dataset
from tests.memory import estimated, taken
from tests.processes import torchrun
from tests.runs import arguments, fit, steps_of
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer, write_rows

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CPU, GPU = pytest.param("cpu", id="cpu"), pytest.param("gpu", marks=ON_GPU, id="gpu")
ROOT = Path(__file__).resolve().parents[2]
LOSS_TOLERANCE = 1e-4  # nats of the mean loss, float32 (TF32 on a GPU)
BF16_TOLERANCE = 0.02  # nats of the mean loss; bfloat16 keeps 8 bits
MEMORY_TOLERANCE = 0.15


def gpu(test):
    """Mark a test that runs on a CUDA device only."""
    for mark in ON_GPU:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("reference", ["cached", "adapters_off", "copy"])
def test_fit_in_bf16_starts_at_ln_2_and_learns(
    reference: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    options += ["--trainer.max_epochs", "3", "--model.lora.r", "8", "--model.reference", reference]
    losses = steps_of(fit(tiny_model_path, tiny_data, tmp_path, options), "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and losses[-1] < losses[0]


class ScaledOnCPU(MixedPrecision):
    """`16-mixed` as on a GPU; Lightning itself takes bfloat16 on a CPU. Its scale changes every other step."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))


@pytest.mark.parametrize("accelerator", [CPU, GPU])
def test_fit_in_float16_starts_at_ln_2_and_goes_on_with_the_scale_it_had(
    accelerator: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    plugin = ["--trainer.plugins", "tests.integration.test_gpu.ScaledOnCPU"]
    options = ["--trainer.precision", "16-mixed"] if accelerator == "gpu" else plugin
    options += ["--trainer.accelerator", accelerator, "--trainer.devices", "1", "--data.validation", "null"]
    options += ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1", "--model.lora.r", "4"]
    options += ["--trainer.max_steps", "5"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    losses, scales = (steps_of(whole, f"train/{name}") for name in ("loss", "loss_scale"))
    assert losses[0] == pytest.approx(math.log(2), abs=0.01) and all(map(math.isfinite, losses))
    (checkpoint,) = (whole / "checkpoints").glob("*step=3.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    (scaler,) = (value for name, value in saved.items() if name in ("ScaledOnCPU", "MixedPrecision"))
    assert scaler["scale"] == scales[3] and len(scales) == 5
    assert accelerator == "gpu" or scales == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12]
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(checkpoint)])
    assert steps_of(resumed, "train/loss_scale") == scales[3:]
    assert steps_of(resumed, "train/loss") == (losses[3:] if accelerator == "cpu" else pytest.approx(losses[3:]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy", "ddp"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_gpus_train_as_one(
    strategy: str, precision: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.accelerator", "gpu", "--trainer.precision", precision, "--trainer.max_steps", "8"]
    options += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--data.validation", "null"]
    options += ["--trainer.gradient_clip_val", "1.0"]
    alone = fit(tiny_model_path, tiny_data, tmp_path / "alone", [*options, "--trainer.devices", "1"])
    halved = [*options, "--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy", strategy]
    torchrun(["-m", "gamma_po", "fit", *arguments(tiny_model_path, tiny_data, tmp_path / "two", halved)])
    (two,) = (tmp_path / "two" / "runs" / "run").iterdir()
    losses = steps_of(alone, "train/loss")
    tolerance = LOSS_TOLERANCE if precision == "32-true" else BF16_TOLERANCE
    assert len(losses) == 8 and abs(losses[-1] - math.log(2)) > 2 * BF16_TOLERANCE
    assert steps_of(two, "train/loss") == pytest.approx(losses, abs=tolerance)


@gpu
def test_the_solver_gives_the_same_margins_as_on_the_cpu() -> None:
    h = torch.randn(4096, dtype=torch.float64)
    for gamma0, tau in ((1.0, 1.0), (4.0, 0.1)):
        there = solve_kl_margins(h.cuda(), gamma0=gamma0, tau=tau).cpu()
        torch.testing.assert_close(there, solve_kl_margins(h, gamma0=gamma0, tau=tau), rtol=0, atol=1e-9)


@gpu
@pytest.mark.parametrize("name", [name for name in MARGINS if name != "column"])
def test_every_margin_works_on_the_device(name: str) -> None:
    options = {"center": True} if name.startswith("kl") else {}
    if name in ("reverse", "shuffled"):
        options = {"inner": build_margin("kl", center=True)}
    margin = build_margin(name, **options).bind(build_loss("dpo"))
    evidence = random_evidence(8)
    h = torch.randn(8, dtype=torch.float64)
    here, _ = margin(h, evidence, margin.fit(evidence.reference))
    there = evidence._replace(
        policy=type(evidence.policy)(*(value.cuda() for value in evidence.policy)),
        reference=type(evidence.policy)(*(value.cuda() for value in evidence.reference)),
    )
    state = state_to_device(margin.fit(there.reference), torch.device("cuda"))
    got, state = margin(h.cuda(), there, state)
    again, _ = margin(h.cuda(), there, state)
    assert again.shape == (8,)
    torch.testing.assert_close(got.cpu(), here, rtol=0, atol=1e-9)


@gpu
def test_layouts_agree_on_the_device() -> None:
    scorer = CompletionScorer(tiny_model().cuda())
    generator = torch.Generator().manual_seed(1)
    parts = [[torch.randint(3, 300, (n,), generator=generator) for n in (4, 7, 1)] for _ in range(3)]
    values = [scorer.sequence_logps(layout(*parts, 0).to("cuda")) for layout in LAYOUTS.values()]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-3)  # TF32


@gpu
@pytest.mark.parametrize("window", [None, 5])
def test_all_sequences_of_a_row_in_one_kernel_are_as_one_by_one(window: int | None) -> None:
    groups = ((7, 40, 33), (1, 1, 64), (90, 5, 6))
    segments = Segments.of(groups, "cuda")
    length = sum(map(sum, groups))
    query, key, value = (torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    in_one = attention._in_one_kernel(query, key, value, segments, None, window)
    wide = (tensor.float() for tensor in (query, key, value))
    loop = attention._one_by_one(*wide, segments, None, 0.0, window, None)
    torch.testing.assert_close(in_one.float(), loop[0].transpose(0, 1), rtol=0.02, atol=0.02)


@gpu
@pytest.mark.parametrize("window", [None, 5])
def test_the_gradient_through_one_kernel_is_as_one_by_one(window: int | None) -> None:
    groups = ((7, 40, 33), (1, 1, 64), (90, 5, 6))
    segments = Segments.of(groups, "cuda")
    length = sum(map(sum, groups))
    inputs = [torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    weight = torch.randn(length, 4, 64, device="cuda")
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    (attention._in_one_kernel(*narrow, segments, None, window).float() * weight).sum().backward()
    wide = [tensor.float().requires_grad_() for tensor in inputs]
    loop = attention._one_by_one(*wide, segments, None, 0.0, window, None)
    (loop[0].transpose(0, 1) * weight).sum().backward()
    for ours, expected in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.float(), expected.grad, rtol=0.05, atol=0.05)


@gpu
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_model_in_bf16_scores_rows_in_one_kernel_as_padded_ones(layout: str, tiny_data: dict[str, str]) -> None:
    model = tiny_model(hidden_size=128).cuda().bfloat16()  # heads of 32
    scorer, data = CompletionScorer(model), tiny_dataset(tiny_data["train"])
    with torch.no_grad():
        rows, expected = (scorer(batch_of(data, range(8), name).to("cuda").model_input) for name in (layout, "padded"))
    per_token = (rows.chosen - expected.chosen).abs() / expected.chosen_length
    assert float(per_token.max()) < 0.05  # nats; bfloat16 keeps 8 bits


@gpu
def test_flex_attention_scores_padded_rows_as_sdpa_does(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    tiny_model(hidden_size=128).save_pretrained(tmp_path)
    batch = batch_of(tiny_dataset(tiny_data["train"]), range(8)).to("cuda")
    found = []
    for backend in ("flex_attention", "sdpa"):
        scorer = CompletionScorer(load_model(ModelConfig(path=str(tmp_path), attention=backend)).cuda())
        with torch.no_grad():
            found.append(scorer(batch.model_input))
    torch.testing.assert_close(found[0].chosen, found[1].chosen, rtol=0, atol=1e-2)  # TF32
    torch.testing.assert_close(found[0].rejected, found[1].rejected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("accelerator", [CPU, GPU])
def test_one_process_under_fsdp2_trains_as_without_it(
    accelerator: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.accelerator", accelerator, "--trainer.devices", "1", "--model.lora.r", "4"]
    options += ["--data.layout", "shared_prefix", "--trainer.gradient_clip_val", "0.05", "--trainer.max_steps", "8"]
    options += ["--data.validation", "null", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    alone = steps_of(fit(tiny_model_path, tiny_data, tmp_path / "alone", options), "train/loss")
    strategy = "--trainer.strategy"
    options += [strategy, "ModelParallelStrategy", f"{strategy}.data_parallel_size", "1"]
    options += [f"{strategy}.tensor_parallel_size", "1"]
    words = arguments(tiny_model_path, tiny_data, tmp_path / "sharded", options)
    # In a process of its own: what Lightning sets up for its processes stays until the end of one.
    done = subprocess.run(
        [sys.executable, "-m", "gamma_po", "fit", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (folder,) = (tmp_path / "sharded" / "runs" / "run").iterdir()
    sharded = steps_of(folder, "train/loss")
    assert len(alone) == 8 and sharded == pytest.approx(alone, abs=LOSS_TOLERANCE)
    assert abs(alone[-1] - math.log(2)) > 100 * LOSS_TOLERANCE  # the comparison says something


@gpu
@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW8bit"])
def test_qlora_starts_at_ln_2_and_learns(
    optimizer: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    options = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    options += ["--model.policy.quantization", "nf4", "--model.lora.r", "8", "--model.lora.alpha", "16"]
    options += ["--data.layout", "shared_prefix", "--model.reference", "adapters_off", "--trainer.max_epochs", "4"]
    options += ["--model.optimizer", optimizer]
    losses = steps_of(fit(tiny_model_path, tiny_data, tmp_path, options), "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert sum(losses[-8:]) < sum(losses[:8])


SMALL_BLOCKS = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
BLOCKS_1B = {  # Llama-3.2-1B's sizes: 1.24 billion weights
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
LORA = ["--model.lora.r", "16"]
QLORA = [*LORA, "--model.policy.quantization", "nf4"]
STACK_RUNS = {
    "lora": LORA,
    "lora, padded": [*LORA, "--data.layout", "padded"],
    "lora, checkpointing": [*LORA, "--model.gradient_checkpointing", "true"],
    "all weights, checkpointing": ["--model.gradient_checkpointing", "true"],
    "qlora, checkpointing": [*QLORA, "--model.gradient_checkpointing", "true"],
}


def block_stack(folder: Path, sizes: dict[str, object], device: str) -> tuple[str, dict[str, str]]:
    """Write a Llama with random weights in bfloat16, and pairs of some hundred tokens for it."""
    with torch.device(device):
        tiny_model(**sizes).bfloat16().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        row | {"chosen": row["chosen"] * (8 + i % 5), "rejected": row["rejected"] * (10 + i % 3)}
        for i, row in enumerate(tiny_rows(24))
    ]
    file = str(write_rows(folder / "rows.jsonl", rows))
    return str(folder / "model"), {"train": file, "validation": "null", "test": "null"}


@pytest.mark.parametrize(
    ("accelerator", "sizes", "options"),
    [
        pytest.param("cpu", SMALL_BLOCKS, STACK_RUNS["lora"], id="small, lora"),
        pytest.param("cpu", SMALL_BLOCKS, STACK_RUNS["qlora, checkpointing"], id="small, qlora, checkpointing"),
        *(
            pytest.param("gpu", BLOCKS_1B, options, marks=ON_GPU, id=f"1b, {name}")
            for name, options in STACK_RUNS.items()
        ),
    ],
)
def test_a_block_stack_in_bf16_takes_the_memory_that_was_estimated_and_starts_at_ln_2(
    accelerator: str, sizes: dict[str, object], options: list[str], tmp_path: Path
) -> None:
    if "nf4" in options:
        pytest.importorskip("bitsandbytes")
    model, data = block_stack(tmp_path, sizes, "cuda" if accelerator == "gpu" else "cpu")
    words = ["--trainer.accelerator", accelerator, "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    words += ["--model.policy.dtype", "bfloat16", "--data.layout", "shared_prefix", "--data.batch_size", "6", *options]
    found = estimated(model, data, tmp_path, words)
    assert found.total - found.libraries == pytest.approx(taken(model, data, tmp_path, words), rel=MEMORY_TOLERANCE)
    (folder,) = (tmp_path / "runs" / "run").iterdir()
    losses = steps_of(folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and all(map(math.isfinite, losses))


@gpu
def test_1b_weights_in_4_bits_take_less_than_a_third_of_those_in_16(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path, _ = block_stack(tmp_path, BLOCKS_1B, "cuda")
    sizes = []
    for quantization in ("nf4", None):
        config = ModelConfig(path=path, dtype="bfloat16", quantization=quantization)
        blocks = attach_lora(load_model(config), Lora(r=16), seed=0).get_base_model().model.layers.cuda()
        sizes.append(parameter_bytes(blocks.parameters()))
    assert sizes[0] < sizes[1] / 3

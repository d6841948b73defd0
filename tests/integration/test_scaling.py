"""The arithmetic of experiments/SCALING.md against models that are built, measured and inspected."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gamma_po.inspection.cost import head_bytes
from gamma_po.layouts import LAYOUTS
from gamma_po.policies import Lora, attach_lora
from tests.saved import saved_bytes

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "experiments" / "sharding" / "scaling.py"
specification = importlib.util.spec_from_file_location("scaling", FILE)
assert specification is not None and specification.loader is not None
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(scaling)
Model = scaling.Model

TOKENS = 128


def llama(model: Model, layers: int, **where: str) -> LlamaForCausalLM:
    """The model with so many layers."""
    config = LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.inner, num_hidden_layers=layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(where.get("device", "cpu")):
        return LlamaForCausalLM(config).bfloat16().train()


def kept(model: Model, layers: int, *, lora: bool, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps."""
    built = llama(model, layers)
    whole = attach_lora(built, Lora(r=16), seed=0) if lora else built
    if checkpointing:
        built.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    return saved_bytes(lambda: built.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.sum(), whole)


def test_parameters_are_those_of_the_models() -> None:
    for model, adapters in ((scaling.LLAMA_8B, 41_943_040), (scaling.LLAMA_70B, 207_093_760)):
        one, two = (sum(p.numel() for p in llama(model, layers, device="meta").parameters()) for layers in (1, 2))
        assert model.parameters == one + (model.layers - 1) * (two - one)
        assert model.adapters(16) == adapters  # as peft counts them: r (in + out) over the seven linear layers


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize(("hidden", "inner", "kv_heads"), [(384, 640, 8), (256, 768, 2)])
def test_activations_follow_the_law_also_at_sizes_that_it_was_not_made_from(
    lora: bool, hidden: int, inner: int, kv_heads: int
) -> None:
    model = Model(name="", layers=3, hidden=hidden, inner=inner, heads=8, kv_heads=kv_heads, vocabulary=64)
    for checkpointing, expected in ((False, model.saved_in_block(lora=lora)), (True, 2 * hidden)):
        one, three = (kept(model, layers, lora=lora, checkpointing=checkpointing) for layers in (1, 3))
        assert (three - one) / 2 / TOKENS == pytest.approx(expected, rel=0.01)


def test_the_head_takes_what_inspect_says_it_takes() -> None:
    run = scaling.Run(model=scaling.LLAMA_8B, gpus=8, tokens=4096)
    parts = [[torch.zeros(n, dtype=torch.long)] for n in (1, 2048, 2048)]
    rows = LAYOUTS["packed"](*parts, 0)
    on_gpu = dataclasses.replace(rows, targets=rows.targets.to("meta"))
    assert scaling.memory(run).head == head_bytes(on_gpu, 1, run.model.vocabulary, scaling.BF16)


def test_sharding_divides_what_is_held_and_not_what_is_gathered() -> None:
    eight, many = (scaling.memory(scaling.Run(model=scaling.LLAMA_70B, gpus=gpus)) for gpus in (8, 64))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(many, name) == pytest.approx(getattr(eight, name) / 8)
    assert (many.gathered, many.activations, many.head) == (eight.gathered, eight.activations, eight.head)
    assert eight.weights * 8 == pytest.approx(4 * 70.55e9, rel=1e-3)


def test_the_document_holds_the_table_that_the_script_prints() -> None:
    assert scaling.table(scaling.RUNS) in (ROOT / "experiments" / "SCALING.md").read_text()

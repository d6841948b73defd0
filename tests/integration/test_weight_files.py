"""Processes that each read their part of the weights have the model that loading it whole gives, in less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gamma_po.errors import ConfigError
from gamma_po.fingerprints import fingerprint
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model, load_parts
from gamma_po.scorer import check_layout
from gamma_po.weight_files import empty_model, source_of
from tests.integration.test_scaling import Model
from tests.processes import torchrun
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

SHARE = 0.75  # of the memory that loading the whole model takes; half of the weights, and a tensor at a time

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from gamma_po.fingerprints import fingerprint
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model, load_parts
from gamma_po.scorer import CompletionScorer
from gamma_po.sharding import shard
from tests.contracts import LAYOUTS

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
tokens = torch.Generator().manual_seed(0)
rows = LAYOUTS["padded"](*[[torch.randint(3, 300, (n,), generator=tokens)] for n in (4, 7, 3)], 0)


def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


def peak(load, config):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest use so far
    before = status("VmRSS")
    scorer = shard(CompletionScorer(load(config)), mesh, "32-true")
    return status("VmHWM") - before, scorer


def whole(scorer):
    return {name: tensor.full_tensor() for name, tensor in scorer.state_dict().items()}


def same(path, lora, dtype):
    config, found = ModelConfig(path=path, dtype=dtype), []
    for load in (load_model, load_parts):
        model = load(config)
        weights = fingerprint(model)
        model = attach_lora(model, Lora(r=2), seed=3) if lora else model
        scorer = shard(CompletionScorer(model), mesh, "32-true")
        trained = sorted(name for name, parameter in scorer.named_parameters() if parameter.requires_grad)
        loss = scorer(rows).chosen.sum()
        loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in scorer.named_parameters() if p.grad is not None}
        found.append((weights, trained, whole(scorer), loss.detach(), gradients, dict(scorer.named_buffers())))
    one, two = found
    assert one[:2] == two[:2] and torch.equal(one[3], two[3])
    for i in (2, 4, 5):
        assert one[i].keys() == two[i].keys()
        for name, value in one[i].items():
            assert torch.equal(value, two[i][name]) and value.dtype == two[i][name].dtype, name


for path in sys.argv[2:]:
    same(path, lora=False, dtype="float32")
    same(path, lora=True, dtype="bfloat16")
in_parts, scorer = peak(load_parts, ModelConfig(path=sys.argv[1]))
del scorer
plain, scorer = peak(load_model, ModelConfig(path=sys.argv[1]))
Path(f"{sys.argv[0]}.peak{rank}").write_text(f"{in_parts} {plain}")

received = {"gathered": 0, "scattered": 0}
gather, scatter = torch.distributed.all_gather_single, torch.distributed.reduce_scatter_single


def counted_gather(output_tensor, input_tensor, **options):
    received["gathered"] += output_tensor.numel() * output_tensor.element_size() // 4
    return gather(output_tensor, input_tensor, **options)


def counted_scatter(output, input, **options):
    received["scattered"] += input.numel() * input.element_size() // 4
    return scatter(output, input, **options)


torch.distributed.all_gather_single, torch.distributed.reduce_scatter_single = counted_gather, counted_scatter
scorer = shard(CompletionScorer(load_parts(ModelConfig(path=sys.argv[-1]))), mesh, "32-true")
scorer(rows).chosen.sum().backward()
Path(f"{sys.argv[0]}.sent{rank}").write_text(f"{received['gathered']} {received['scattered']}")
torch.distributed.destroy_process_group()
"""


def save(folder: Path, **options: object) -> str:
    """A model in files of its own."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_two_processes_read_the_same_model_in_parts_and_neither_ever_holds_all_of_it(tmp_path: Path) -> None:
    large = save(tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)  # 230 MB
    odd = {"vocab_size": 321, "intermediate_size": 51}  # rows that two processes cannot share evenly
    tied = save(tmp_path / "tied", **odd)
    apart = save(tmp_path / "apart", tie_word_embeddings=False, num_hidden_layers=3)
    script = tmp_path / "parts.py"
    script.write_text(SCRIPT)
    torchrun([str(script), large, tied, apart])
    peaks, sent = ([Path(f"{script}.{name}{rank}").read_text().split() for rank in (0, 1)] for name in ("peak", "sent"))
    sizes = Model(name="", layers=3, hidden=32, inner=64, heads=4, kv_heads=2, vocabulary=320)
    assert sent == [[str(sizes.gathered_per_micro_batch), str(sizes.parameters)]] * 2
    for in_parts, whole in peaks:
        assert int(in_parts) < SHARE * int(whole), (in_parts, whole)


def test_a_model_without_weights_has_the_fingerprint_and_the_buffers_of_the_one_with_them(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model"))
    config = ModelConfig(path=path)
    whole, empty = load_model(config), load_parts(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert fingerprint(empty) == fingerprint(whole) != fingerprint(tiny_model(seed=1))
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, dict(empty.named_buffers())[name])
    assert empty.generation_config.to_dict() == whole.generation_config.to_dict()
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    adapted = attach_lora(load_parts(config), Lora(r=2), seed=5)
    expected = attach_lora(load_model(config), Lora(r=2), seed=5).state_dict()
    for name, value in adapted.state_dict().items():
        assert value.is_meta != ("lora_" in name)
        assert value.is_meta or torch.equal(value, expected[name])
    assert {name for name, _ in adapted.named_parameters(remove_duplicate=False) if "lora_" not in name} == set(
        source_of(adapted)
    )


def test_files_that_do_not_name_each_parameter_are_loaded_whole_with_a_word_about_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tiny_model(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    renamed = {name.replace("self_attn", "attention"): value for name, value in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    model = load_parts(ModelConfig(path=str(path)))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert "is loaded whole by every process before it is sharded" in caplog.text


def test_quantised_weights_and_tensors_that_no_parameter_takes_are_loaded_whole(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    weights = load_file(path / "model.safetensors")

    def parts_with(**more: torch.Tensor) -> bool:
        named = {name.replace("__", "."): value for name, value in more.items()}
        save_file(weights | named, path / "model.safetensors", metadata={"format": "pt"})
        return empty_model({"pretrained_model_name_or_path": str(path)}, torch.float32, "sdpa") is not None

    assert parts_with() and parts_with(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert not parts_with(model__layers__0__mlp__up_proj__weight_scale_inv=torch.ones(1, 1))
    config = json.loads((path / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    assert not parts_with()


def test_only_the_files_that_transformers_reads_count(tmp_path: Path) -> None:
    path = tmp_path / "model"
    tiny_model(tie_word_embeddings=False).save_pretrained(path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(path)
    index = path / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    config = ModelConfig(path=str(path))
    whole = fingerprint(load_model(config))
    stray = {name: value + 7 for name, value in load_model(config).state_dict().items()}
    save_file(stray, path / "model_old.safetensors", metadata={"format": "pt"})
    parts = load_parts(config)
    assert next(parts.parameters()).is_meta and fingerprint(parts) == fingerprint(load_model(config)) == whole
    index.unlink()
    assert empty_model({"pretrained_model_name_or_path": str(path)}, torch.float32, "sdpa") is None
    save_file(stray, path / "model.safetensors", metadata={"format": "pt"})  # comes before the shards
    assert fingerprint(load_parts(config)) == fingerprint(load_model(config)) != whole


@pytest.mark.parametrize("load", [load_model, load_parts])
def test_a_model_that_cannot_attend_in_segments_is_refused_also_without_its_weights(
    load: Callable[[ModelConfig], PreTrainedModel], tmp_path: Path
) -> None:
    config = ModelConfig(path=str(save_tiny_model(tmp_path / "model")))

    def changed(change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
        model = load(config)
        change(model)
        check_layout("padded", model, "sdpa")
        check_layout("packed", load(config), "sdpa")
        return model

    model = changed(lambda m: setattr(m.config, "layer_types", ["linear_attention"] * 2))
    with pytest.raises(ConfigError, match=r"layout=packed does not work here: llama has layers of linear_attention"):
        check_layout("packed", model, "sdpa")
    model = changed(lambda m: setattr(m, "_supports_attention_backend", False))
    with pytest.raises(ConfigError, match="llama does not let its attention be exchanged; allowed: padded"):
        check_layout("shared_prefix", model, "sdpa")
    with pytest.raises(ConfigError, match="attention=flash_attention_2 cannot attend in segments"):
        check_layout("packed", load(config), "flash_attention_2")

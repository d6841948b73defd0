"""Every experiment file opens with its command, its sources and its result, is short, and is understood."""

from __future__ import annotations

import shlex
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gamma_po.cli import PreferenceCLI
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.module import PreferenceModule
from gamma_po.scorer import check_layout

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "experiments" / "studies"  # files of `study`, not of `fit`
FILES = sorted(
    path for path in (ROOT / "experiments").rglob("*.yaml") if path.name != "base.yaml" and STUDIES not in path.parents
)
RESOLVED: dict[Path, dict[str, Any]] = {}
COMPARED = {"run.name", "model.lora.r", "model.lora.alpha", "model.optimizer.class_path", "model.policy.quantization"}
OPTIMIZER = "model.optimizer.init_args."  # each optimizer has options of its own; of those, only what all share counts
SHARED = {OPTIMIZER + name for name in ("lr", "weight_decay", "betas", "eps")}
COMPARED |= {"data.tokenization.max_prompt_length", "data.tokenization.max_completion_length"}
METHODS = "methods"  # folders that compare losses and margins, each with its own options and learning rate
METHOD = ("model.loss.", "model.margin.", "model.optimizer.init_args.lr", "run.name")
STRATEGY = "trainer.strategy"  # with its own options
GPUS = (STRATEGY, "trainer.num_nodes", "trainer.accumulate_grad_batches", "trainer.precision", "model.policy.")
GPUS += ("model.lora",)
ONE_PROCESS = ("--trainer.strategy", "auto", "--trainer.devices", "1")  # building them all would start the others


def name_of(path: Path) -> str:
    """Folder and name, as the test's id."""
    return path.relative_to(ROOT / "experiments").as_posix()


def options_of(path: Path) -> list[str]:
    """The options of the command that the file opens with."""
    (command,) = [line[1:].strip() for line in path.read_text().splitlines() if "python -m gamma_po" in line]
    assert str(path.relative_to(ROOT)) in command
    return shlex.split(command)[4:]


def resolved(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The whole configuration, as `--print_config` gives it."""
    if path not in RESOLVED:
        with pytest.raises(SystemExit) as stop:
            PreferenceCLI(["fit", *options_of(path), "--print_config"])
        assert stop.value.code == 0
        RESOLVED[path] = flat(yaml.safe_load(capsys.readouterr().out))
    return RESOLVED[path]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_experiment_file_is_short_says_what_it_is_and_is_understood(
    path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len(lines) - len(head) <= 25
    assert any("Numbers:" in line for line in head) and any("Measured:" in line for line in head)
    monkeypatch.chdir(ROOT)
    options = [*options_of(path), "--model.policy.path", tiny_model_path]
    cli = PreferenceCLI(
        [*options, "--trainer.accelerator", "cpu", "--trainer.logger", "false", *ONE_PROCESS], run=False
    )
    assert isinstance(cli.model, PreferenceModule) and isinstance(cli.datamodule, PreferenceDataModule)
    cli.model.configure_model()
    assert any(parameter.requires_grad for parameter in cli.model.policy.parameters())


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in FILES if path.parent.name != "experiments"}), ids=name_of
)
def test_the_files_of_one_folder_differ_only_in_what_they_compare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    configs = [resolved(path, capsys) for path in FILES if path.parent == folder]
    assert len(configs) > 1
    for one, other in combinations(configs, 2):
        assert one["run.name"] != other["run.name"]
        different = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
        if folder.name == METHODS:
            assert all(key.startswith(METHOD) for key in different)
            continue
        own = {key for key in different if key.startswith((OPTIMIZER, STRATEGY))} - SHARED
        if folder.name == "sharding":  # which model, on how many GPUs
            own = {key for key in different if key.startswith((OPTIMIZER, *GPUS))}
        assert different - own <= COMPARED


PUBLISHED = {  # β, γ0/β, τ, learning rate: the names of the γ-PO authors' training configurations
    "llama-3-8b-instruct": (10, 0.4, 10, 1e-6),
    "mistral-7b-instruct": (2.5, 0.15, 10, 6e-7),
    "gemma-2-9b-it": (10, 0.5, 20, 8e-7),
    "qwen2.5-7b-instruct": (10, 0.3, 3, 1e-6),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_runs_have_their_published_numbers_and_three_counterparts(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    folder = ROOT / "experiments" / model / METHODS
    beta, ratio, tau, rate = PUBLISHED[model]
    config = resolved(folder / "gamma_simpo.yaml", capsys)
    assert config["model.loss.class_path"].endswith("SimPO") and config["model.loss.init_args.beta"] == beta
    assert config["model.margin.class_path"].endswith("KL") and config["model.margin.init_args.center"] is False
    assert config["model.margin.init_args.gamma0"] == pytest.approx(beta * ratio)
    assert config["model.margin.init_args.tau"] == tau
    assert config["model.optimizer.init_args.lr"] == rate
    assert config["trainer.devices"] * config["data.batch_size"] * config["trainer.accumulate_grad_batches"] == (
        64 if "gemma" in model else 128
    )
    assert config["model.policy.dtype"] == "float32" and config["trainer.precision"] == "bf16-mixed"
    lengths = [config[f"data.tokenization.max_{name}"] for name in ("prompt_length", "completion_length", "length")]
    assert lengths == [1800, None, 2048]
    counterparts = {path.stem for path in folder.glob("*.yaml")} - {"base", "gamma_simpo"}
    assert counterparts == {"simpo", "gamma_dpo", "dpo"}


@pytest.mark.parametrize("model", PUBLISHED)
def test_recipes_for_small_cards_keep_the_published_number_of_pairs_per_step(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    files = [path for path in FILES if path.parent == ROOT / "experiments" / model]
    assert len(files) == 3
    for path in files:
        config = resolved(path, capsys)
        pairs = 64 if "gemma" in model else 128
        assert config["data.batch_size"] * config["trainer.accumulate_grad_batches"] == pairs
        assert f"global batch {pairs}," in path.read_text()


FAMILIES = {
    "llama-3-8b-instruct": (LlamaConfig, LlamaForCausalLM),
    "mistral-7b-instruct": (MistralConfig, MistralForCausalLM),
    "gemma-2-9b-it": (Gemma2Config, Gemma2ForCausalLM),
    "qwen2.5-7b-instruct": (Qwen2Config, Qwen2ForCausalLM),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_each_recipes_layout_and_attention_suit_its_family_of_models(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    kind, architecture = FAMILIES[model]
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    own = {"sliding_window": None} if model.startswith("mistral") else {}  # as in v0.2
    for path in (path for path in FILES if model in path.parts):
        config = resolved(path, capsys)
        attention = config["model.policy.attention"]
        tiny = architecture._from_config(kind(**sizes, **heads, **own), attn_implementation=attention).eval()
        check_layout(config["data.layout"], tiny, attention)

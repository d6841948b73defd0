"""Trained adapters go on their own base and on no other one, however it is loaded and wherever they lie."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gamma_po.__main__ import main
from gamma_po.adapters import RECORD
from gamma_po.bases import base_fingerprint
from gamma_po.errors import ConfigError
from gamma_po.evaluation import pair_scores
from gamma_po.fingerprints import Fingerprint, difference, fingerprint, sampled_fingerprint
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model, without_weights
from gamma_po.saved import SavedPolicy, check_start, open_policy
from tests.runs import Run, arguments, run
from tests.tiny import tiny_model, tiny_tokenizer

LORA = ["--model.lora.r", "4", "--model.optimizer.lr", "0.03", "--trainer.limit_train_batches", "2"]
OTHER_BASE = r"was written with a base of other weights \(fingerprint \w{12} in training, \w{12} here\)"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of the same shapes and other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lora_run(tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished LoRA run."""
    return run_once(tiny_model_path, tiny_data, tmp_path_factory.mktemp("run"), LORA)


@pytest.fixture(scope="module")
def run_against_other(
    tiny_model_path: str, other: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished LoRA run whose reference is not the start of its policy."""
    options = [*LORA, "--model.reference_model.path", other]
    return run_once(tiny_model_path, tiny_data, tmp_path_factory.mktemp("run"), options)


def run_once(model: str, data: dict[str, str], folder: Path, options: list[str]) -> Run:
    """A run for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("sys.argv", ["gamma_po"])
        return run("fit", model, data, folder, options)


def last(finished: Run) -> Path:
    """The last checkpoint of a run."""
    return finished.trainer_dir / "checkpoints" / "last.ckpt"


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of some tokens, in eval mode."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 25)[None]).logits


def test_generate_evaluate_and_export_refuse_another_base_and_name_both(
    lora_run: Run, other: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = shutil.copytree(lora_run.trainer_dir / "policy", tmp_path / "elsewhere")
    pairs = ["--pairs", tiny_data["test"]]
    for place in (last(lora_run), lora_run.trainer_dir / "policy", elsewhere):
        policy = ["--policy.path", str(place), "--policy.base", other]
        for command in (["generate", *policy, "--interactive"], ["evaluate", *policy, *pairs]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert re.search(rf"error: {place} {OTHER_BASE}; the base here is '{other}'; allowed: the model", error)
    for form in ("as_trained", "merged"):
        output = tmp_path / form
        arguments = ["--policy", str(last(lora_run)), "--output", str(output), "--form", form, "--base", other]
        assert main(["export", *arguments]) == 2 and not output.exists()
        assert re.search(OTHER_BASE, capsys.readouterr().err)


def test_a_base_that_was_exchanged_at_its_place_is_refused_and_one_that_was_moved_taken(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(tiny_model_path, tmp_path / "base"))
    finished = run("fit", str(place), tiny_data, tmp_path, LORA)
    moved = place.rename(tmp_path / "moved")
    for path in (last(finished), finished.trainer_dir / "policy"):
        opened = open_policy(SavedPolicy(path=str(path), base=str(moved)))
        assert torch.equal(logits(opened.model), logits(finished.cli.model.policy.model))
    shutil.copytree(moved, place)
    tiny_model(seed=1).save_pretrained(place)
    for path in (last(finished), finished.trainer_dir / "policy"):
        with pytest.raises(ConfigError, match=OTHER_BASE):
            open_policy(SavedPolicy(path=str(path)))


def test_training_does_not_start_from_an_adapter_on_another_base_than_its_own(
    lora_run: Run, tiny_model_path: str, other: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(lora_run.trainer_dir / "policy", tmp_path / "adapter"))
    begin = ["--model.policy.adapter", str(adapter), "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    refused = rf"{adapter} {OTHER_BASE}; the base here is '{other}'; allowed: .*as the path beside `adapter`"
    for options in ([], ["--model.lora.r", "2", "--model.policy.dtype", "bfloat16"]):
        with pytest.raises(ConfigError, match=refused):
            run("fit", other, tiny_data, tmp_path, [*begin, *options])
        run("fit", tiny_model_path, tiny_data, tmp_path, [*begin, *options])
    of_reference = ["--model.reference_model.path", other, "--model.reference_model.adapter", str(adapter)]
    with pytest.raises(ConfigError, match=refused):
        run("fit", tiny_model_path, tiny_data, tmp_path, [*begin, *of_reference])
    (adapter / RECORD).unlink()  # as of an adapter from elsewhere
    run("fit", other, tiny_data, tmp_path, begin)


def test_inspect_refuses_it_also_where_the_model_is_too_large_to_be_loaded(
    lora_run: Run,
    other: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gamma_po.commands.inspect.free_memory", lambda device: 1000)
    options = ["--model.policy.adapter", str(lora_run.trainer_dir / "policy"), "--trainer.devices", "2"]
    options += ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2"]
    options += ["--trainer.strategy.tensor_parallel_size", "1"]
    assert main(["inspect", *arguments(other, tiny_data, tmp_path, options)]) == 1
    assert re.search(OTHER_BASE, " ".join(capsys.readouterr().err.split()))


def test_an_adapter_with_another_one_in_start_is_known_by_the_base_below_both(
    tiny_model_path: str, other: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--model.policy.adapter", save_adapter(tmp_path / "sft", seed=1)]
    policy = run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir / "policy"
    check_start(ModelConfig(path=tiny_model_path, adapter=str(policy)))
    with pytest.raises(ConfigError, match=OTHER_BASE):
        check_start(ModelConfig(path=other, adapter=str(policy)))
    shutil.rmtree(policy / "start")
    with pytest.raises(ConfigError, match=OTHER_BASE):
        check_start(ModelConfig(path=tiny_model_path, adapter=str(policy)))


def test_checkpoints_and_adapters_that_do_not_say_their_base_go_on_any(
    lora_run: Run, other: str, tmp_path: Path
) -> None:
    checkpoint = torch.load(last(lora_run), weights_only=True)
    adapter = Path(shutil.copytree(lora_run.trainer_dir / "policy", tmp_path / "adapter"))
    del checkpoint["base_weights"]
    torch.save(checkpoint, tmp_path / "before.ckpt")
    torch.save({**checkpoint, "base_weights": "0" * 64}, tmp_path / "other_kind.ckpt")
    (adapter / RECORD).unlink()
    for place in (tmp_path / "before.ckpt", tmp_path / "other_kind.ckpt", adapter):
        open_policy(SavedPolicy(path=str(place), base=other))


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_the_base_is_known_again_in_every_dtype(
    trained: str, tiny_model_path: str, other: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--model.policy.dtype", trained]
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, options)
    elsewhere = shutil.copytree(finished.trainer_dir / "policy", tmp_path / "elsewhere")  # opens in float32
    for dtype in (None, "float32", "bfloat16", "float16"):
        for place in (last(finished), elsewhere):
            saved = SavedPolicy(path=str(place), dtype=dtype)
            assert open_policy(saved).model.dtype == getattr(torch, dtype or open_policy(saved).start.dtype)
            with pytest.raises(ConfigError, match=OTHER_BASE):
                open_policy(replace(saved, base=other))


def test_an_adapter_exported_in_another_dtype_still_knows_its_base(lora_run: Run, other: str, tmp_path: Path) -> None:
    arguments = ["--policy", str(last(lora_run)), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(["export", *arguments]) == 0
    open_policy(SavedPolicy(path=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=OTHER_BASE):
        open_policy(SavedPolicy(path=str(tmp_path / "out"), base=other))


def test_a_quantised_base_is_known_again_unquantised(
    tiny_model_path: str, other: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--model.policy.quantization", "nf4"])
    elsewhere = shutil.copytree(finished.trainer_dir / "policy", tmp_path / "elsewhere")
    for saved in (
        SavedPolicy(path=str(last(finished))),
        SavedPolicy(path=str(last(finished)), full_precision=True),
        SavedPolicy(path=str(last(finished)), full_precision=True, dtype="bfloat16"),
        SavedPolicy(path=str(elsewhere)),
    ):
        quantised = saved.path.endswith(".ckpt") and not saved.full_precision
        assert getattr(open_policy(saved).model, "is_quantized", False) == quantised
        with pytest.raises(ConfigError, match=OTHER_BASE):
            open_policy(replace(saved, base=other))


def test_a_base_in_files_that_cannot_be_read_in_parts_is_known_again_except_quantised(
    tiny_model_path: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    config = ModelConfig(path=str(folder), dtype="bfloat16")
    assert without_weights(config) is None
    found = base_fingerprint(config)
    assert found == base_fingerprint(config, load_model(config)) == sampled_fingerprint(tiny_model().bfloat16())
    in_float32 = load_model(replace(config, dtype="float32"))
    assert found == base_fingerprint(config, in_float32) != sampled_fingerprint(in_float32)
    pytest.importorskip("bitsandbytes")
    assert base_fingerprint(replace(config, quantization="nf4")) is None


def save_adapter(folder: Path, seed: int) -> str:
    """Write an adapter of random weights for the tiny model."""
    adapted = attach_lora(tiny_model(), Lora(r=3), seed=seed)
    adapted.save_pretrained(folder)
    return str(folder)


def test_a_base_with_an_adapter_in_it_is_known_by_both_and_not_by_how_merging_rounds(
    tiny_model_path: str, tmp_path: Path
) -> None:
    config = ModelConfig(path=tiny_model_path, adapter=save_adapter(tmp_path / "sft", seed=1))
    model, before = load_model(config), base_fingerprint(config)
    assert before.weights != base_fingerprint(replace(config, adapter=None)).weights
    with torch.no_grad():  # as on a processor that adds in another order
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-22)
    assert base_fingerprint(config, model) == before
    file = tmp_path / "sft" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value + 1e-3 for name, value in weights.items()}, file, metadata={"format": "pt"})
    other_weights = base_fingerprint(config).weights
    description = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps({**description, "lora_alpha": 1}))
    assert len({before.weights, other_weights, base_fingerprint(config).weights}) == 3


def test_an_exported_adapter_that_lost_what_it_stands_on_is_refused(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--model.policy.adapter", save_adapter(tmp_path / "sft", seed=1)]
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, options)
    elsewhere = Path(shutil.copytree(finished.trainer_dir / "policy", tmp_path / "elsewhere"))
    shutil.rmtree(tmp_path / "sft")
    opened = open_policy(SavedPolicy(path=str(elsewhere)))  # finds its base, which its description does not name
    assert torch.equal(logits(opened.model), logits(finished.cli.model.policy.model))
    shutil.rmtree(elsewhere / "start")
    with pytest.raises(ConfigError, match=OTHER_BASE):
        open_policy(SavedPolicy(path=str(elsewhere), base=tiny_model_path))


# --- the record beside an exported adapter ----------------------------------------------------------------------


def test_the_record_says_base_and_reference_and_peft_and_transformers_load_the_folder_as_ever(
    run_against_other: Run, tiny_model_path: str, other: str, tmp_path: Path
) -> None:
    finished = run_against_other
    by_command = tmp_path / "by_command"
    assert main(["export", "--policy", str(finished.trainer_dir), "--output", str(by_command)]) == 0
    expected = logits(finished.cli.model.policy.model)
    records = []
    for folder in (finished.trainer_dir / "policy", by_command):
        records.append(json.loads((folder / "gamma_po.json").read_text()))
        on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), folder)
        for loaded in (on_base, AutoModelForCausalLM.from_pretrained(folder)):
            torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert records[0] == records[1]
    assert records[0]["policy"]["path"] == tiny_model_path and records[0]["reference_model"]["path"] == other
    assert Fingerprint.of(records[0]["base_weights"]) == sampled_fingerprint(tiny_model())


def test_evaluate_compares_an_adapter_outside_of_its_run_with_the_reference_of_the_run(
    run_against_other: Run, other: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(run_against_other.trainer_dir / "policy", tmp_path / "elsewhere")
    found = []
    for place, output in ((run_against_other.trainer_dir, tmp_path / "1.json"), (elsewhere, tmp_path / "2.json")):
        command = ["evaluate", "--policy", str(place), "--pairs", tiny_data["test"], "--output", str(output)]
        assert main(command) == 0
        found.append(json.loads(output.read_text()))
    assert found[0] == found[1] and found[0]["settings"]["reference"] == other


def test_no_record_makes_code_be_trusted(
    lora_run: Run, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(lora_run.trainer_dir / "policy", tmp_path / "adapter"))
    record, loaded = json.loads((adapter / RECORD).read_text()), []
    record["policy"]["trust_remote_code"] = True
    record["reference_model"] = {"path": other, "trust_remote_code": True}
    (adapter / RECORD).write_text(json.dumps(record))

    def recorded(config: ModelConfig) -> nn.Module:
        loaded.append(config)
        return load_model(config)

    monkeypatch.setattr(pair_scores, "load_model", recorded)
    opened = open_policy(SavedPolicy(path=str(adapter)))
    with pair_scores.opened_reference(opened, None):
        assert [(config.path, config.trust_remote_code) for config in loaded] == [(other, False)]
    assert opened.start.trust_remote_code is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "it does not say its format"),
        ({"policy": {"path": 3}}, "does not say what the adapter was trained on"),
        ({"reference_model": "x"}, "does not say what the adapter was trained on"),
        ({"policy": {"path": "x", "code": "y"}}, "ModelConfig has no option code"),
        ({"policy": {"path": "x", "dtype": "int8"}}, "dtype='int8' is not allowed; allowed: float32"),
        ({"gamma_po_format": 2}, "its format is 2, newer than this program"),
        ({"base_weights": {"version": 3, "weights": 5, "settings": {}}}, "a damaged fingerprint"),
    ],
)
def test_a_record_that_is_damaged_or_newer_is_refused(
    changes: str | dict[str, Any], message: str, lora_run: Run, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(lora_run.trainer_dir / "policy", tmp_path / "adapter"))
    record = json.loads((adapter / RECORD).read_text())
    (adapter / RECORD).write_text(changes if isinstance(changes, str) else json.dumps(record | changes))
    with pytest.raises(ConfigError, match=message):
        open_policy(SavedPolicy(path=str(adapter)))


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 in training, 1e-05 here"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_parameters.rope_theta: 10000.0 in training, 500000.0 here",
        ),
    ],
)
def test_a_setting_that_was_changed_is_another_base(
    change: dict[str, Any], said: str, lora_run: Run, tiny_model_path: str, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(tiny_model_path, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=re.escape(f"a base of other settings ({said})")):
        open_policy(SavedPolicy(path=str(last(lora_run)), base=str(changed)))


def test_a_setting_that_another_version_of_transformers_brings_or_drops_is_no_other_base(
    lora_run: Run, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_now = LlamaConfig.to_dict

    def later(config: LlamaConfig) -> dict[str, Any]:
        settings = as_now(config)
        del settings["pretraining_tp"]
        return settings | {"transformers_version": "9.0", "attention_sinks": False}

    whole = sampled_fingerprint(tiny_model())
    monkeypatch.setattr(LlamaConfig, "to_dict", later)
    here = sampled_fingerprint(tiny_model())
    assert here.settings != whole.settings and difference(whole, here) is None and here.digest != whole.digest
    open_policy(SavedPolicy(path=str(last(lora_run))))
    run("fit", tiny_model_path, tiny_data, tmp_path, [*LORA, "--ckpt_path", str(last(lora_run))])


def test_the_digest_of_all_weights_finds_one_number_and_one_setting() -> None:
    model = tiny_model()
    before = fingerprint(model)
    assert fingerprint(tiny_model()).digest == before.digest
    assert fingerprint(tiny_model(rms_norm_eps=1e-5)).digest != before.digest
    with torch.no_grad():
        model.model.embed_tokens.weight[100, 7] += 1e-3
    assert fingerprint(model).digest != before.digest and difference(before, fingerprint(model)) is not None

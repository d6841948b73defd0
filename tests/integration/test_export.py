"""What `fit` leaves behind loads with plain transformers and peft, and is the policy that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gamma_po.policies import export_policy
from tests.runs import Run, run
from tests.tiny import tiny_model, tiny_tokenizer

LOGIT_TOLERANCE = 1e-5
LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8", "--model.lora.dropout", "0.1"]


def trained_logits(finished: Run, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of the policy as training left it in memory."""
    policy = finished.cli.model.policy.model.eval()
    with torch.no_grad():
        return policy(input_ids=input_ids).logits


@pytest.mark.parametrize("mode", [[], LORA], ids=["full", "lora"])
def test_the_exported_folder_loads_elsewhere_and_gives_the_trained_policys_logits(
    mode: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, [*mode, "--model.optimizer.lr", "0.03"])
    folder = finished.trainer_dir / "policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the dog is very"}], tokenize=False)
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    assert input_ids.tolist() == [tiny_tokenizer()(text).input_ids]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    with torch.no_grad():
        before = base(input_ids=input_ids).logits
        if mode:
            assert not (folder / "model.safetensors").exists()  # an adapter, not a model
            loaded = PeftModel.from_pretrained(base, folder).eval()
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        after = loaded(input_ids=input_ids).logits
    expected = trained_logits(finished, input_ids)
    torch.testing.assert_close(after, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert float((after - before).abs().max()) > 100 * LOGIT_TOLERANCE  # training moved it


def test_an_export_replaces_nothing_and_mixes_with_nothing(tmp_path: Path) -> None:
    for name in ("policy.partial", "policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"someone's")
    (tmp_path / "policy-1").write_text("a file")
    written = export_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy")
    assert written == tmp_path / "policy-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "policy-1", "policy-2", "policy.partial"]
    for name in ("policy.partial", "policy"):
        assert [path.read_bytes() for path in (tmp_path / name).iterdir()] == [b"someone's"]
    assert not (written / "adapter_model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(written)


def test_an_export_that_fails_half_way_leaves_no_folder_that_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()

    def fails(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        export_policy(tiny_model(), tokenizer, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_directory_is_the_current_one_deletes_no_policy_there(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.txt").write_text("kept")
    options = ["--trainer.logger", "false", "--trainer.default_root_dir", ".", "--trainer.max_steps", "1"]
    run("fit", tiny_model_path, tiny_data, tmp_path, options)
    assert [path.read_text() for path in (tmp_path / "policy").iterdir()] == ["kept"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy-1")


class SharedFolderLogger(DummyLogger):
    """A logger whose folder, like those of most services, is the same for all runs: the current one."""

    @property
    def save_dir(self) -> str:
        """The current folder."""
        return "."


def test_a_run_with_a_logger_of_the_users_choice_keeps_a_directory_of_its_own(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    options = ["--trainer.logger", f"{__name__}.SharedFolderLogger", "--trainer.max_steps", "1"]
    finished = run("fit", tiny_model_path, tiny_data, tmp_path, options)
    assert finished.trainer_dir.parent == tmp_path / "runs" / "run"
    assert {"config.yaml", "metrics.csv", "policy"} <= {path.name for path in finished.trainer_dir.iterdir()}
    assert any(isinstance(logger, SharedFolderLogger) for logger in finished.cli.trainer.loggers)
    assert not list(elsewhere.iterdir())


def test_the_export_can_be_switched_off(tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path) -> None:
    options = ["--export.enabled", "false", "--trainer.max_steps", "1"]
    assert not (run("fit", tiny_model_path, tiny_data, tmp_path, options).trainer_dir / "policy").exists()

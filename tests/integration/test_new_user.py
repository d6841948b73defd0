"""Ten pairs of one's own, a tuned adapter, a chat with it: the README's path, on the tiny model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gamma_po.__main__ import main
from tests.tiny import tiny_rows, write_rows


def test_ten_pairs_become_an_adapter_to_chat_with(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("pairs.jsonl"), tiny_rows(10))
    options = [
        *("--model.policy.path", tiny_model_path, "--model.lora.r", "4", "--model.loss", "DPO", "--model.margin", "KL"),
        *("--data.train", "pairs.jsonl", "--data.batch_size", "2", "--trainer.max_epochs", "2", "--run.name", "mine"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
        *("--report.enabled", "false"),
    ]
    assert main(["inspect", *options]) == 0
    assert main(["fit", *options]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat is\n"))
    capsys.readouterr()
    assert main(["generate", "--policy", "runs/mine", "--interactive", "--sampling.max_new_tokens", "4"]) == 0
    assert "chat with runs/mine" in capsys.readouterr().out
    assert main(["export", "--checkpoint", "runs/mine", "--output", "my_model", "--form", "merged"]) == 0
    AutoModelForCausalLM.from_pretrained("my_model")

"""Ten pairs of one's own, a tuned adapter, a chat with it: the README's path, on the tiny model."""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gamma_po.__main__ import main
from gamma_po.commands.inspect import InspectCLI
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
    assert main(["export", "--policy", "runs/mine", "--output", "my_model", "--form", "merged"]) == 0
    AutoModelForCausalLM.from_pretrained("my_model")
    assert main(["export", "--policy", "runs/mine", "--output", "my_adapter"]) == 0
    shutil.rmtree("runs")
    for folder in ("my_model", "my_adapter"):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat is\n"))
        assert main(["generate", "--policy", folder, "--interactive", "--sampling.max_new_tokens", "4"]) == 0


ROW = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
FILES = {
    "p.csv": "prompt,chosen,rejected\nHi,Hello!,Go away.\n",
    "p.json": json.dumps([ROW]),
    "list.json": json.dumps([{**ROW, "path": "p.csv"}]),
    "one.jsonl": json.dumps(ROW),
    "word.csv": "null",
    "empty.jsonl": "",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_pairs_is_never_read_as_settings(
    name: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name])
    Path("fit.yaml").write_text(f"data: {{train: {name}}}\nmodel: {{policy: {{path: {tiny_model_path}}}}}\n")
    ways = (["--data.train", name, "--model.policy.path", tiny_model_path], ["--config", "fit.yaml"])
    for given in ways:
        cli = InspectCLI(["fit", *given, "--model.loss", "DPO", "--model.margin", "KL"])
        assert cli.datamodule.sources["train"] == name


def test_what_libraries_say_about_each_other_and_sell_is_not_shown(
    tiny_model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    deprecated = "`is_gradient_checkpointing` is deprecated", "`isinstance(treespec, LeafSpec)` is deprecated, use"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(["presets"]) == 0
        for message in (*deprecated, "the learning rate is negative"):
            warnings.warn(message, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["the learning rate is negative"]
    given = ["--model.policy.path", tiny_model_path, "--data.train", "unread.jsonl", "--run.root", str(tmp_path)]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):  # `inspect` says less
        InspectCLI(["fit", *given, "--trainer.accelerator", "cpu", "--model.loss", "DPO", "--model.margin", "KL"])
    assert "GPU available" in caplog.text and "litlogger" not in caplog.text

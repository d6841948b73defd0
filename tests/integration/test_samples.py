"""Samples of each epoch as a table: in the run directory, TensorBoard, Weights & Biases; training is untouched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gamma_po.callbacks.samples import Samples
from gamma_po.cli import run as run_command
from gamma_po.errors import ConfigError
from gamma_po.saved import SavedPolicy, open_policy
from tests.runs import arguments, fit, steps_of

DRAWN = ["--samples.num_prompts", "3", "--samples.sampling.max_new_tokens", "5", "--trainer.max_epochs", "2"]


def greedy(folder: Path, prompt: str) -> str:
    """The likeliest continuation under the last epoch's policy, token by token."""
    opened = open_policy(SavedPolicy(path=str(folder)))
    text = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = opened.tokenizer(text, return_tensors="pt").input_ids
    out = opened.model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
    return opened.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_each_epoch_leaves_a_table_of_what_the_policy_writes_and_training_is_the_same(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    greedy_too = [*DRAWN, "--samples.sampling.temperature", "0", "--model.lora.r", "2", "--model.lora.dropout", "0.2"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, greedy_too)
    without = [word for word in greedy_too if "samples" not in word and word not in ("3", "5", "0")]
    plain = fit(tiny_model_path, tiny_data, tmp_path, without)
    tables = [
        [json.loads(line) for line in (folder / "samples" / f"epoch-00{epoch}.jsonl").read_text().splitlines()]
        for epoch in (1, 2)
    ]
    lines = Path(tiny_data["validation"]).read_text().splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:3]
    for epoch, rows in enumerate(tables, start=1):
        assert [row["prompt"] for row in rows] == prompts
        assert {(row["epoch"], row["step"]) for row in rows} == {(epoch, 8 * epoch)}
    assert [row["completion"] for row in tables[1]] == [greedy(folder, prompt) for prompt in prompts]
    for key in ("train/loss", "train/rewards/margins", "val/loss"):
        assert steps_of(folder, key) == steps_of(plain, key)
    assert not (plain / "samples").exists()
    (events,) = folder.glob("events.*")
    seen = EventAccumulator(str(events)).Reload().Tags()
    assert "samples/text_summary" in seen["tensors"]


def test_drawing_at_a_temperature_leaves_the_random_state_as_it_was(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Samples.on_train_epoch_end

    def between(self: Samples, *args: Any) -> None:
        before = torch.get_rng_state()
        original(self, *args)
        seen.append((before, torch.get_rng_state()))

    monkeypatch.setattr(Samples, "on_train_epoch_end", between)
    folder = fit(tiny_model_path, tiny_data, tmp_path, [*DRAWN, "--samples.sampling.temperature", "1"])
    assert len(list((folder / "samples").iterdir())) == len(seen) == 2
    assert all(torch.equal(before, after) for before, after in seen)


def test_samples_that_cannot_be_drawn_are_refused_or_told(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tiny_model_path, tiny_data, tmp_path, [*DRAWN, "--data.validation", "null"])
    assert run_command(["fit", *given]) == 2
    assert "samples.split='validation': data.validation is not set; allowed here: train" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"samples.every_n_epochs is not used with samples.num_prompts=0"):
        Samples(every_n_epochs=2)
    for strategy in (ModelParallelStrategy(), type("DeepSpeed", (DDPStrategy,), {})()):
        sharded = SimpleNamespace(strategy=strategy, datamodule=None)
        with pytest.warns(UserWarning, match=f"no samples: {type(strategy).__name__} may shard the policy"):
            Samples(num_prompts=2).on_fit_start(sharded, None)
    alone = SimpleNamespace(strategy=SingleDeviceStrategy(), datamodule=None)
    with pytest.raises(ConfigError, match=r"samples.num_prompts=2: the prompts are a data module's"):
        Samples(num_prompts=2).on_fit_start(alone, None)


def test_weights_and_biases_gets_metrics_histograms_and_samples_without_a_network(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logged: list[dict[str, object]] = []
    tables: list[tuple[str, list[str], int]] = []

    def keep(self: WandbLogger, metrics: dict[str, object], step: int | None = None) -> None:
        logged.append(metrics)
        original(self, metrics, step)

    def keep_table(self: WandbLogger, key: str, columns: list[str], data: list[list[object]], **rest: object) -> None:
        tables.append((key, columns, len(data)))
        original_table(self, key, columns=columns, data=data, **rest)

    original, original_table = WandbLogger.log_metrics, WandbLogger.log_table
    monkeypatch.setattr(WandbLogger, "log_metrics", keep)
    monkeypatch.setattr(WandbLogger, "log_table", keep_table)
    options = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true"]
    fit(tiny_model_path, tiny_data, tmp_path, [*DRAWN, *options, "--trainer.logger.save_dir", str(tmp_path)])
    keys = {key for metrics in logged for key in metrics}
    assert {"train/loss", "val/loss", "train/lr", "train/tokens_per_second", "train/gamma/mean"} <= keys
    counts = [m["train/histogram/gamma"].histogram for m in logged if "train/histogram/gamma" in m]
    assert counts and all(sum(histogram) == 32 for histogram in counts)
    assert tables == [("samples", ["epoch", "step", "prompt", "completion", "tokens"], 3)] * 2
    assert list(tmp_path.rglob("run-*.wandb"))


def test_a_configured_logger_comes_in_addition(tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    given = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(own), "--trainer.max_steps", "1"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, given)
    assert (folder / "metrics.csv").is_file() and len(list(folder.glob("events.*"))) == 1
    assert len(list(own.rglob("metrics.csv"))) == 1
    given[1] = "TensorBoardLogger"
    folder = fit(tiny_model_path, tiny_data, tmp_path, given)
    assert (folder / "metrics.csv").is_file() and not list(folder.glob("events.*"))
    assert len(list(own.rglob("events.*"))) == 1

"""Precision and broken numbers, on the real module."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from gamma_po.cli import run as run_command
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.errors import ConfigError
from gamma_po.losses import DPO
from gamma_po.margins import KL
from gamma_po.module import PreferenceModule
from gamma_po.policies import ModelConfig
from tests.runs import arguments, fit, run, steps_of
from tests.tiny import tiny_rows, write_rows


@pytest.mark.parametrize("mode", [[], ["--model.lora.r", "4"]], ids=["full", "lora"])
def test_bf16_true_trains_with_float32_margins_and_losses(
    mode: list[str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*mode, "--trainer.precision", "bf16-true", "--report.enabled", "true", "--report.num_prompts", "2"]
    done = run("fit", tiny_model_path, tiny_data, tmp_path, options)
    losses = steps_of(done.trainer_dir, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=0.01) and all(map(math.isfinite, losses))
    module = done.cli.model
    assert module.margin_state.reward_margin.dtype == torch.float64
    assert module.last_output.per_pair.dtype == module.last_output.target_margin.dtype == torch.float32
    assert (done.trainer_dir / "report.json").is_file()


def by_hand(model: str, data: dict[str, str], tmp_path: Path) -> tuple[PreferenceModule, PreferenceDataModule]:
    """A module and data made in Python."""
    module = PreferenceModule(
        ModelConfig(path=model), DPO(), KL(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), warmup_ratio=0.0
    )
    return module, PreferenceDataModule(train=data["train"], batch_size=4, cache_dir=str(tmp_path / "cache"))


def trainer(tmp_path: Path, **options: object) -> Trainer:
    """A quiet trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, default_root_dir=tmp_path, **quiet, **options
    )


def test_a_nan_is_reported_with_step_and_rows_before_the_margin_is_solved(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    module, data = by_hand(tiny_model_path, tiny_data, tmp_path)
    trainer(tmp_path, max_steps=1).fit(module, data)
    with torch.no_grad():
        module.policy.model.model.norm.weight.fill_(torch.nan)
    module.train()
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(FloatingPointError, match=r"step \d+: the reward margin is not finite.*rows \[\d+, .*lower lea"):
        module.training_step(batch, 1)


@pytest.mark.usefixtures("drawn_figures")
def test_weights_spoiled_before_the_command_starts_end_it_with_one_message(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e30", "--model.warmup_ratio", "0"]
    status = run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, options)])
    said = capsys.readouterr().err
    assert (
        status == 1 and re.search(r"stopped: .*step \d+.*(not finite|is nan|is inf)", said) and "Traceback" not in said
    )


def test_a_module_trained_before_is_never_scored_as_its_own_reference(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    module, data = by_hand(tiny_model_path, tiny_data, tmp_path)
    trainer(tmp_path, max_steps=3).fit(module, data)
    first = data.datasets["train"].reference
    fresh = PreferenceDataModule(train=tiny_data["train"], batch_size=4, cache_dir=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="before the first step, policy and reference differ"):
        trainer(tmp_path, max_steps=1).fit(module, fresh)
    again = fresh.datasets["train"].reference
    torch.testing.assert_close(again.chosen, first.chosen, rtol=0, atol=1e-4)


def test_limiting_the_test_batches_limits_the_report(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    for loss in (["--model.loss", "DPO"], ["--model.loss", "SimPO", "--model.loss.beta", "2.0"]):
        checkpoint = fit(tiny_model_path, tiny_data, tmp_path, loss) / "checkpoints" / "last.ckpt"
        options = [*loss, "--ckpt_path", str(checkpoint), "--trainer.limit_test_batches", "1"]
        options += ["--data.eval_batch_size", "4", "--report.enabled", "true", "--report.num_prompts", "1"]
        done = run("test", tiny_model_path, tiny_data, tmp_path, options)
        assert '"num_pairs": 4' in (done.trainer_dir / "report.json").read_text()


def test_a_reference_that_nobody_reads_and_an_endless_schedule_are_refused(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simpo = ["--model.loss", "SimPO", "--model.loss.beta", "2.0", "--model.reference", "copy"]
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, simpo)]) == 2
    assert "model.reference=copy is not used: neither the loss simpo" in capsys.readouterr().err
    endless = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00"]
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, endless)]) == 2
    assert "set trainer.max_steps or trainer.max_epochs" in capsys.readouterr().err


def test_a_margin_column_is_used_by_the_column_margin_and_refused_with_others(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "gap": 0.5} for row in tiny_rows(8)]
    train = write_rows(tmp_path / "gaps.jsonl", rows)  # type: ignore[arg-type]
    data = [
        "--data.train",
        str(train),
        "--data.validation",
        "null",
        "--data.test",
        "null",
        "--data.columns.margin",
        "gap",
    ]
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, data)]) == 2
    said = capsys.readouterr().err
    assert "data.columns.margin='gap' is not used: the margin kl" in said
    assert "allowed with: column, or reverse and shuffled around it" in said
    done = run("fit", tiny_model_path, tiny_data, tmp_path, [*data, "--model.margin", "Column"])
    assert done.cli.model.last_output.target_margin.tolist() == [0.5] * 4


def test_a_fused_optimizer_is_clipped_under_bf16_mixed_as_any_other(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    weights = []
    for fused in ("true", "false"):
        options = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.fused", fused]
        options += ["--model.optimizer.lr", "0.001", "--model.optimizer.eps", "1.0"]  # so that the norm matters
        options += ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "0.01"]
        module = run("fit", tiny_model_path, tiny_data, tmp_path / fused, options).cli.model
        weights.append(torch.cat([p.detach().flatten() for p in module.policy.parameters()]))
    start = PreferenceModule(ModelConfig(path=tiny_model_path), DPO(), KL(), reference="copy")
    start.configure_model()
    start = torch.cat([p.detach().flatten() for p in start.policy.parameters()])
    moved = [float((w - start).norm()) for w in weights]
    assert moved[0] == pytest.approx(moved[1], rel=0.02) and 0 < moved[0] < 8 * 0.001 * 0.01

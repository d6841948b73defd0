"""`fit` from the command line's own parser: every loss with every margin, LoRA and full, learns; runs repeat."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from gamma_po.__main__ import main
from gamma_po.module import PreferenceModule
from tests.runs import arguments, fit, steps_of

MARGINS = {
    "none": ["--model.margin", "NoMargin"],
    "fixed": ["--model.margin", "Fixed", "--model.margin.gamma", "0.5"],
    "kl": ["--model.margin", "KL", "--model.margin.tau", "0.5"],
    "map": ["--model.margin", "Map", "--model.margin.shape", "Softplus"],
    "reverse": ["--model.margin", "Reverse", "--model.margin.inner", "KL", "--model.margin.inner.tau", "0.5"],
}
LOSSES = {"dpo": ["--model.loss", "DPO"], "simpo": ["--model.loss", "SimPO"], "ipo": ["--model.loss", "IPO"]}
LORA = ["--model.lora.r", "8", "--model.lora.alpha", "16"]
CASES = list(product(LOSSES, MARGINS, ("full", "lora")))


@pytest.mark.parametrize(("loss", "margin", "mode"), CASES)
def test_the_loss_falls_and_the_reward_margin_rises(
    loss: str, margin: str, mode: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = LOSSES[loss] + MARGINS[margin] + (LORA if mode == "lora" else [])
    options += ["--trainer.max_epochs", "4", "--trainer.limit_val_batches", "0"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    losses, margins = steps_of(folder, "train/loss"), steps_of(folder, "train/rewards/margins")
    assert len(losses) == 32
    assert sum(losses[-10:]) < sum(losses[:10])
    assert sum(margins[-10:]) > sum(margins[:10])


def test_two_runs_with_one_seed_give_identical_losses_and_another_seed_does_not(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--model.lora.dropout", "0.1"]
    runs = [
        steps_of(fit(tiny_model_path, tiny_data, tmp_path, [*options, "--seed_everything", seed]), "train/loss")
        for seed in ("1", "1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.usefixtures("drawn_figures")
def test_a_run_leaves_its_record_logs_plots_checkpoint_policy_and_report(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    folder = fit(tiny_model_path, tiny_data, tmp_path, ["--report.enabled", "true", "--report.num_prompts", "3"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"config.yaml", "run.json", "metrics.csv", "report.json", "checkpoints/last.ckpt"} <= names
    figures = {"plots/loss.png", "plots/reward_margin.png", "plots/gamma_histogram.png"}
    assert figures <= names and all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert {"policy/config.json", "policy/tokenizer.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0 and record["versions"]["torch"] == torch.__version__ and record["commit"]
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {f"train/gamma/{key}" for key in ("mean", "std", "min", "max", "p10", "p50", "p90", "corr")}
    wanted |= {"train/gamma/strength", "train/gamma/gradient_weight", "val/loss", "val/rewards/accuracies"}
    wanted |= {"val/accuracy/policy", "val/accuracy/reference", "train/logps/chosen", "train/rewards/rejected"}
    assert wanted <= set(columns)
    report = json.loads((folder / "report.json").read_text())
    assert report["pairs"]["num_pairs"] == 11 and len(report["texts"]) == 3
    low, mean, high = (report["pairs"]["accuracy_policy"][key] for key in ("low", "mean", "high"))
    assert 0 <= low <= mean <= high <= 1


def test_the_resolved_configuration_runs_again_with_the_same_losses(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    first = fit(tiny_model_path, tiny_data, tmp_path, LORA)
    again = fit(tiny_model_path, tiny_data, tmp_path, [], config=first / "config.yaml")
    assert steps_of(first, "train/loss") == steps_of(again, "train/loss")


def test_label_noise_changes_training_and_not_validation(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    still = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.0", "--model.margin", "NoMargin"]
    clean = fit(tiny_model_path, tiny_data, tmp_path, still)
    noisy = fit(tiny_model_path, tiny_data, tmp_path, [*still, "--data.label_noise", "1.0"])
    for folder in (clean, noisy):
        assert steps_of(folder, "train/loss") == pytest.approx([torch.log(torch.tensor(2.0)).item()] * 8, abs=1e-6)
    assert steps_of(clean, "val/accuracy/reference") == steps_of(noisy, "val/accuracy/reference")
    chosen = [steps_of(folder, "train/logps/chosen") for folder in (clean, noisy)]
    rejected = [steps_of(folder, "train/logps/rejected") for folder in (clean, noisy)]
    assert chosen[0] == rejected[1] and rejected[0] == chosen[1] and chosen[0] != chosen[1]


def test_each_epoch_takes_the_pairs_in_another_order(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    step = PreferenceModule.training_step

    def recording(module: PreferenceModule, batch: object, batch_idx: int) -> object:
        seen.setdefault(module.current_epoch, []).extend(batch.index.tolist())
        return step(module, batch, batch_idx)

    monkeypatch.setattr(PreferenceModule, "training_step", recording)
    fit(tiny_model_path, tiny_data, tmp_path, ["--trainer.max_epochs", "3", "--model.loss", "SimPO"])
    assert sorted(seen) == [0, 1, 2] and all(sorted(rows) == list(range(32)) for rows in seen.values())
    assert len({tuple(rows) for rows in seen.values()}) == 3


def test_without_a_test_split_the_table_at_the_end_has_the_last_values_of_training_and_validation(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.test", "null", "--report.enabled", "true"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [steps_of(folder, f"{split}/loss")[-1] for split in ("train", "val")]
    assert ["loss", *(f"{loss:.3f}" for loss in losses)] in rows
    assert ["mean", "γ", f"{steps_of(folder, 'train/gamma/mean')[-1]:.3f}", "-"] in rows


def test_a_full_gpu_ends_a_run_with_one_message_and_what_takes_less(
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(PreferenceModule, "training_step", full)
    assert main(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, [])]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped:")]
    assert "CUDA out of memory. Tried to allocate 2 GiB. Less memory: model.gradient_checkpointing: true" in line

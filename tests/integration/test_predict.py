"""`validate`, `test` and `predict` from a checkpoint say what `fit` said; the start of a run is checked."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.cli import run as run_command
from gamma_po.module import PreferenceModule
from tests import oracle
from tests.contracts import tiny_dataset
from tests.runs import arguments, fit, run, steps_of
from tests.tiny import tiny_model, tiny_rows, write_rows

LOGP_TOLERANCE = 1e-4  # nats per sequence, float32 against float64
METRIC_TOLERANCE = 1e-6
LORA = ["--model.lora.r", "4", "--model.lora.alpha", "8"]
COLUMNS = {
    "index", "loss", "target_margin", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected",
    "reference_logps_chosen", "reference_logps_rejected", "length_chosen", "length_rejected",
}  # fmt: skip
METRICS = ["loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "accuracy/policy", "accuracy/reference"]


@pytest.mark.parametrize("mode", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("margin", ["KL", "Map"])
def test_validate_and_test_of_a_checkpoint_repeat_the_numbers_at_the_end_of_fit(
    mode: list[str], margin: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*mode, "--model.margin", margin]
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    expected = {name: steps_of(folder, f"val/{name}") for name in METRICS}
    again = [*options, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    validated = run("validate", tiny_model_path, tiny_data, tmp_path, again)
    same_rows = [*again, "--data.test", tiny_data["validation"]]
    tested = run("test", tiny_model_path, tiny_data, tmp_path, same_rows)
    for name, values in expected.items():
        assert values and float(validated.cli.trainer.callback_metrics[f"val/{name}"]) == pytest.approx(
            values[-1], abs=METRIC_TOLERANCE
        )
        assert float(tested.cli.trainer.callback_metrics[f"test/{name}"]) == pytest.approx(
            values[-1], abs=METRIC_TOLERANCE
        )
    assert {folder, validated.trainer_dir, tested.trainer_dir} == set((tmp_path / "runs" / "run").iterdir())


def test_predict_writes_one_row_per_pair_in_order(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    folder = fit(tiny_model_path, tiny_data, tmp_path, ["--model.loss.beta", "0.3"])
    options = ["--model.loss.beta", "0.3", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    finished = run("predict", tiny_model_path, tiny_data, tmp_path, [*options, "--data.eval_batch_size", "4"])
    table = pq.read_table(finished.trainer_dir / "predictions.parquet").to_pydict()
    assert set(table) == COLUMNS and table["index"] == list(range(11))
    pairs = tiny_dataset(tiny_data["test"]).pairs
    trained = oracle.double(finished.cli.model.policy.model.eval())
    for prefix, model in (("", trained), ("reference_", oracle.double(tiny_model()))):
        with torch.no_grad():
            chosen, rejected = oracle.pair_logps(model, pairs)
        assert table[f"{prefix}logps_chosen"] == pytest.approx(chosen.tolist(), abs=LOGP_TOLERANCE)
        assert table[f"{prefix}logps_rejected"] == pytest.approx(rejected.tolist(), abs=LOGP_TOLERANCE)
    assert table["length_chosen"] == [len(pair.chosen) for pair in pairs]
    for row in range(11):
        reward = 0.3 * (table["logps_chosen"][row] - table["reference_logps_chosen"][row])
        assert table["rewards_chosen"][row] == pytest.approx(reward, abs=LOGP_TOLERANCE)


def test_predict_without_a_reference_leaves_its_columns_empty(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--model.loss", "SimPO", "--model.margin", "NoMargin"]
    finished = run("predict", tiny_model_path, tiny_data, tmp_path, options)
    table = pq.read_table(finished.trainer_dir / "predictions.parquet")
    assert table.num_rows == 11 and set(table.column_names) == COLUMNS
    assert all(value != value for value in table["reference_logps_chosen"].to_pylist())  # NaN
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing was scored


def test_the_map_margin_without_a_fitted_state_says_so(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tiny_model_path, tiny_data, tmp_path, ["--model.margin", "Map"])
    assert run_command(["validate", *given]) == 2
    assert "give a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_command_refuses_what_the_margin_cannot_take_by_its_row_before_a_model_is_loaded(
    command: str,
    tiny_model_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(PreferenceModule, "configure_model")
    rows = [row | {"gap": float(i != 4)} for i, row in enumerate(tiny_rows(8))]
    data = dict.fromkeys(("train", "validation", "test"), str(write_rows(tmp_path / "rated.jsonl", rows)))
    column = ["--data.columns.margin", "gap", "--model.margin", "Column"]
    given = arguments(tiny_model_path, data, tmp_path, [*column, "--model.margin.transform", "log"])
    assert run_command([command, *given]) == 2
    assert "rated.jsonl, row 5 (line 5): the margin column gives 0, which the margin Column(" in capsys.readouterr().err
    assert run_command([command, *given, "--model.margin", "NoMargin"]) == 2
    assert "data.columns.margin='gap' is not used: the margin none" in capsys.readouterr().err
    assert run_command([command, *arguments(tiny_model_path, data, tmp_path, ["--model.margin", "Column"])]) == 2
    assert "data.columns.margin is not set; the margin Column(" in capsys.readouterr().err


class DisturbPolicy(Callback):
    """Moves the policy after the reference was scored and before the first step; named on the command line."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.policy.parameters():
                parameter.add_(0.05)


DISTURB = ["--trainer.callbacks", "tests.integration.test_predict.DisturbPolicy"]


def test_a_policy_that_moved_after_the_scoring_is_found_before_the_first_step(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, DISTURB)]) == 2
    message = capsys.readouterr().err
    assert "before the first step, policy and reference differ by" in message and "pair in row" in message
    assert "the policy's weights changed after the reference was scored" in message


def test_the_agreement_check_does_not_stand_in_the_way_of_a_resume_or_of_another_reference(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    run("fit", tiny_model_path, tiny_data, tmp_path, ["--model.reference_model.path", str(other), *DISTURB])
    often = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    first = fit(tiny_model_path, tiny_data, tmp_path, often)
    resume = ["--ckpt_path", str(first / "checkpoints" / "epoch=0-step=3.ckpt"), *DISTURB]
    resumed = fit(tiny_model_path, tiny_data, tmp_path, resume)
    assert len(steps_of(resumed, "train/loss")) == 5


def test_another_reference_model_is_the_one_that_is_scored(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    pairs = tiny_dataset(tiny_data["test"]).pairs
    with torch.no_grad():
        chosen, _ = oracle.pair_logps(oracle.double(tiny_model(seed=1)), pairs)
    for source in ("cached", "copy"):
        options = ["--model.reference_model.path", str(other), "--model.reference", source]
        finished = run("predict", tiny_model_path, tiny_data, tmp_path, options)
        table = pq.read_table(finished.trainer_dir / "predictions.parquet").to_pydict()
        assert table["reference_logps_chosen"] == pytest.approx(chosen.tolist(), abs=LOGP_TOLERANCE)

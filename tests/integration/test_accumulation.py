"""Steps of several micro-batches: checkpoints lie between steps only, and what is logged is of the whole step."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from gamma_po.callbacks.checkpoint import RunCheckpoint
from gamma_po.errors import ConfigError
from gamma_po.module import PreferenceModule
from gamma_po.objective import training_log
from gamma_po.ranks import Local
from tests.integration.test_numerics import by_hand, trainer
from tests.integration.test_resume import EVERY_STEP, LORA, assert_same_ending, checkpoint_at
from tests.runs import fit, steps_of
from tests.tiny import tiny_rows, write_rows

THREE = [
    "--data.batch_size",
    "2",
    "--trainer.accumulate_grad_batches",
    "3",
]  # 16 micro-batches: 5 steps and a short one
STEPS = 6  # in such an epoch
SAME_PAIRS = 2e-5  # absolute; float32 sums in another order, after a few steps of SGD
VALUES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.schedule", "constant"]
SGD += ["--model.warmup_ratio", "0", "--model.margin", "NoMargin", "--model.loss.beta", "0.3"]
NO_VALIDATION = ["--trainer.limit_val_batches", "0"]


def micro_batches_in(folder: Path) -> dict[int, int]:
    """Optimizer step -> micro-batches of its epoch that are in the checkpoint, of all checkpoints in a folder."""
    states = [torch.load(file, weights_only=True) for file in folder.glob("*.ckpt")]
    counts = {s["global_step"]: s["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"] for s in states}
    assert all(count["processed"] == count["ready"] for count in counts.values())
    return {step: count["processed"] for step, count in counts.items()}


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_run_resumed_from_the_first_checkpoint_of_a_resumed_run_ends_with_the_same_bits(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, *THREE, *EVERY_STEP, "--trainer.max_epochs", "2", "--pair_recorder.every_n_steps", "1"]
    whole = before = fit(tiny_model_path, tiny_data, tmp_path, options)
    for step in (2, 3):
        resume = [*options, "--ckpt_path", str(checkpoint_at(before, step))]
        before = fit(tiny_model_path, tiny_data, tmp_path, resume)
        assert_same_ending(whole, before, step)
        found = micro_batches_in(before / "checkpoints")
        assert found == {later: min(3 * ((later - 1) % STEPS + 1), 16) for later in range(step + 1, 2 * STEPS + 1)}


def test_with_a_validation_inside_the_epoch_checkpoints_hold_whole_steps_too(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*THREE, "--trainer.val_check_interval", "6", "--checkpoint.monitor", "val/loss"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--checkpoint.save_top_k", "-1"])
    assert micro_batches_in(folder / "checkpoints") == {2: 6, 4: 12}


class Ends(Callback):
    """Lets a training end, or break off, behind a micro-batch."""

    def __init__(self, at: int, *, by: str) -> None:
        self.at, self.by = at, by

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Do it."""
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 != self.at:
            return
        if self.by == "exception":
            raise Broken
        trainer.should_stop = True


class Broken(Exception):
    """Ends a training."""


def train(folder: Path, *callbacks: Callback, validate_every: float = 1.0, **options: Any) -> dict[int, int]:
    """Train for two epochs of ten micro-batches, in steps of four; see what the checkpoints hold."""
    used = Trainer(
        max_epochs=2, limit_train_batches=10, limit_val_batches=1, val_check_interval=validate_every,
        accumulate_grad_batches=4, num_sanity_val_steps=0, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    used.callbacks[:] = [*callbacks, RunCheckpoint(dirpath=str(folder), save_last=True, save_top_k=-1, **options)]
    try:
        used.fit(BoringModel())
    except Broken:
        assert any(isinstance(one, Ends) and one.by == "exception" for one in callbacks)
    return micro_batches_in(folder)


EVERY = {1: 4, 2: 8, 3: 10, 4: 4, 5: 8, 6: 10}  # step -> micro-batches of the epoch
WHEN: dict[str, tuple[dict[str, Any], dict[int, int]]] = {
    "steps": ({"every_n_train_steps": 1}, EVERY),
    "every other step": ({"every_n_train_steps": 2}, {2: 8, 4: 4, 6: 10}),
    "time": ({"train_time_interval": timedelta(0)}, EVERY),
    "epochs": ({}, {3: 10, 6: 10}),
    "validations": ({"validate_every": 2}, {2: 8, 1: 4, 3: 10, 4: 4, 5: 8, 6: 10}),
    "validations inside steps": ({"validate_every": 5}, {3: 10, 6: 10}),
}


@pytest.mark.parametrize("when", WHEN)
def test_whatever_asks_for_checkpoints_they_hold_whole_steps(when: str, tmp_path: Path) -> None:
    options, expected = WHEN[when]
    assert train(tmp_path / "checkpoints", **options) == expected


@pytest.mark.parametrize(("at", "last"), [(5, {2: 8}), (8, {2: 8}), (9, {3: 10}), (13, {4: 4})])
def test_a_training_told_to_end_inside_a_step_ends_behind_it_with_a_checkpoint(
    at: int, last: dict[int, int], tmp_path: Path
) -> None:
    """As `trainer.max_time` does; without a checkpoint the epoch's training would be lost."""
    found = train(tmp_path / "checkpoints", Ends(at, by="stop"))
    assert dict([max(found.items())]) == last


def test_a_checkpoint_due_by_the_clock_inside_a_step_is_saved_at_its_end(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 6:
                trainer.checkpoint_callback._last_time_checked = -math.inf

    assert train(tmp_path / "checkpoints", Late(), train_time_interval=timedelta(days=1)) == {2: 8}


@pytest.mark.parametrize(("at", "found"), [(5, {}), (7, {}), (8, {2: 8}), (10, {3: 10})])
def test_an_exception_inside_a_step_saves_nothing(at: int, found: dict[int, int], tmp_path: Path) -> None:
    ends = Ends(at, by="exception")
    assert train(tmp_path / "checkpoints", ends, save_on_exception=True, every_n_epochs=5) == found


def test_an_exception_in_a_micro_batch_saves_nothing_though_the_step_would_end_with_it(tmp_path: Path) -> None:
    class Breaks(Ends):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 8:
                raise Broken

    assert train(tmp_path / "checkpoints", Breaks(0, by="exception"), save_on_exception=True) == {}


REFUSED = {
    "of an epoch": (["--trainer.val_check_interval", "4"], r"val_check_interval=4 .* multiple of 3 or of 16"),
    "a share": (["--trainer.val_check_interval", "0.5"], r"=0.5 validates every 8 of an epoch's 16 .*_batches=3 "),
    "a time": (["--trainer.val_check_interval", "00:00:01:00"], r"is a time, 60 s, .*accumulate_grad_batches=3 "),
    "across epochs": (
        ["--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"],
        r"limit_train_batches makes epochs a multiple of 3",
    ),
    "steps alone are given": (
        ["--trainer.val_check_interval", "4", "--trainer.max_epochs", "-1", "--trainer.max_steps", "5"],
        r"val_check_interval=4 .* multiple of 3 or of 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validations_inside_a_step_are_refused(
    case: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        fit(tiny_model_path, tiny_data, tmp_path, [*THREE, *options])


ACROSS = ["--trainer.check_val_every_n_epoch", "null"]
STEPS_ALONE = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "5"]
ALLOWED = {
    "a share of whole steps": (["--trainer.val_check_interval", "0.75"], 1),
    "across epochs of whole steps": (
        ["--trainer.val_check_interval", "18", "--trainer.limit_train_batches", "15", *ACROSS],
        1,
    ),
    "nothing to validate": (["--trainer.val_check_interval", "4", "--data.validation", "null"], 0),
    "steps alone are given": (["--trainer.val_check_interval", "0.75", *STEPS_ALONE], 1),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_validations_between_steps_are_not_refused(
    case: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, validations = ALLOWED[case]
    epochs = "2" if options[-2:] == ACROSS else "1"
    folder = fit(tiny_model_path, tiny_data, tmp_path, [*THREE, "--trainer.max_epochs", epochs, *options])
    assert len(steps_of(folder, "val/loss")) == validations


# --- what is logged -------------------------------------------------------------------------------------------------


class Recorded:
    """What the training steps made, pair by pair: (pairs, loss) of each micro-batch in turn; reductions over ranks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.losses: list[torch.Tensor] = []
        self.logged: list[dict[str, float]] = []
        self.reductions = 0
        step, mean = PreferenceModule.training_step, Local.mean

        def recording(module: PreferenceModule, *given: Any) -> Any:
            found = step(module, *given)
            self.losses.append(found["output"].per_pair)
            self.logged.append({name: float(value) for name, value in training_log(found["output"]).items()})
            return found

        def counting(ranks: Local, values: torch.Tensor) -> torch.Tensor:
            self.reductions += 1
            return mean(ranks, values)

        patch.setattr(PreferenceModule, "training_step", recording)
        patch.setattr(Local, "mean", counting)


def test_one_micro_batch_per_step_logs_its_own_values_bit_for_bit(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    folder = fit(tiny_model_path, tiny_data, tmp_path, NO_VALIDATION)
    assert len(recorded.logged) == 8
    for name in recorded.logged[0]:
        assert steps_of(folder, name) == [values[name] for values in recorded.logged]


def test_four_micro_batches_log_what_one_of_four_times_the_size_does(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    sizes = (["--data.batch_size", "8"], ["--data.batch_size", "2", "--trainer.accumulate_grad_batches", "4"])
    one, four = (fit(tiny_model_path, tiny_data, tmp_path, [*SGD, *NO_VALIDATION, *size]) for size in sizes)
    for name in (*VALUES, "grad_norm"):
        expected = steps_of(one, f"train/{name}")
        assert len(expected) == 4 and steps_of(four, f"train/{name}") == pytest.approx(expected, abs=SAME_PAIRS)
    # Before the first step all margins are 0 up to rounding, on either side of it.
    expected = steps_of(one, "train/rewards/accuracies")[1:]
    assert min(expected) > 0 and steps_of(four, "train/rewards/accuracies")[1:] == pytest.approx(expected)


@pytest.mark.parametrize("by_tokens", [False, True], ids=["pairs", "tokens"])
def test_every_pair_of_a_step_counts_alike_also_where_micro_batches_differ_in_size_or_number(
    by_tokens: bool, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_rows(32)
    for row in rows[::5]:
        row["chosen"] += " and good" * 12
    options = [*THREE, *NO_VALIDATION, "--data.train", str(write_rows(tmp_path / "uneven.jsonl", rows))]
    options += ["--data.length_window", "1"] if by_tokens else []
    recorded = Recorded(monkeypatch)
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    steps = [torch.cat(recorded.losses[start : start + 3]) for start in range(0, 16, 3)]
    assert (len({len(losses) for losses in recorded.losses}) > 1) is by_tokens
    assert [len(losses) for losses in steps] == [6] * 5 + [2]
    assert steps_of(folder, "train/loss") == pytest.approx([float(losses.mean()) for losses in steps], abs=1e-6)
    assert recorded.reductions == STEPS


def test_what_a_loss_remembers_is_logged_as_the_mean_of_what_it_was_in_the_step(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    betas: list[float] = []
    step = PreferenceModule.training_step

    def recording(module: PreferenceModule, *given: Any) -> Any:
        found = step(module, *given)
        betas.append(float(module.loss_state.beta))
        return found

    monkeypatch.setattr(PreferenceModule, "training_step", recording)
    folder = fit(tiny_model_path, tiny_data, tmp_path, [*THREE, *NO_VALIDATION, "--model.loss", "BetaDPO"])
    expected = [sum(betas[start : start + 3]) / len(betas[start : start + 3]) for start in range(0, 16, 3)]
    assert len(set(expected)) == STEPS and steps_of(folder, "train/beta") == pytest.approx(expected, rel=1e-6)


def test_a_module_that_was_stopped_inside_a_step_logs_nothing_of_it_later(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    module, data = by_hand(tiny_model_path, tiny_data, tmp_path)
    module._step_log.micro_batches = [torch.full((7,), 1e6)]
    used = trainer(tmp_path, max_steps=1, log_every_n_steps=1, accumulate_grad_batches=3)
    used.fit(module, data)
    assert float(used.logged_metrics["train/loss"]) < 10

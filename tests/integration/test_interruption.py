"""Interruptions at any moment leave whole files or none; the next start finds what to go on from, or says why not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from gamma_po.callbacks.interruption import SIGNALS, StopBetweenSteps
from gamma_po.checkpoints import StraightToFile, save_whole, tidy
from gamma_po.ckpt_path import named_checkpoint
from gamma_po.cli import PreferenceCLI
from gamma_po.cli import run as run_command
from gamma_po.errors import ConfigError
from gamma_po.files import ABANDONED, abandoned, being_written
from gamma_po.policies import export_policy
from gamma_po.runs import FORMAT_KEY, RECORDS, find_checkpoint, furthest_checkpoint, read_checkpoint, runs_in
from tests.integration.test_resume import (
    EVERY_STEP,
    LORA,
    assert_identical,
    assert_same_ending,
    checkpoint_at,
    last_state,
    rows_by_step,
    start,
    wait_for,
)
from tests.runs import arguments, fit, run, steps_of
from tests.tiny import tiny_model, tiny_rows, tiny_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ["--pair_recorder.every_n_steps", "1"]


def soak(model: str, data: dict[str, str], root: Path, how: list[str], options: list[str]) -> dict[str, Any]:
    """Run `python -m experiments.soak` on the tiny model; return its figures."""
    given = arguments(model, data, root, options)
    command = [sys.executable, "-m", "experiments.soak", "--work", str(root / "soak"), *how, "--", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*LORA, "--trainer.max_epochs", "3", "--checkpoint.every_n_train_steps", "1"]
    figures = soak(
        tiny_model_path, tiny_data, tmp_path, ["--kills", "4", "--seed", "3", "--after-first-checkpoint"], options
    )
    assert figures["kills"] == 4 and figures["restarts_at_the_last_checkpoint"] >= 1


def test_sigterm_while_the_reference_is_scored_leaves_no_broken_cache_and_in_training_a_checkpoint(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "many.jsonl", tiny_rows(1200))
    options = ["--data.train", str(rows), "--data.eval_batch_size", "1", *LORA, *RECORDED]
    options += ["--trainer.limit_train_batches", "40", "--trainer.limit_val_batches", "0"]
    command = ["fit", *arguments(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", "last"])]
    process = start(command, tmp_path / "cache")
    wait_for("cache/gamma_po/reference/*", tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in errors
    folder = tmp_path / "cache" / "gamma_po" / "reference"
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {".safetensors", ".lock"}
    for shard in folder.rglob("*.safetensors"):
        load_file(shard)
    process = start([*command, "--data.num_workers", "1"], tmp_path / "cache")
    wait_for("runs/run/*/pairs/step-000002.parquet", tmp_path, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: to the processes that collate, too
    _, errors = process.communicate(timeout=120)
    (stopped,) = (tmp_path / "runs" / "run").glob("*/checkpoints/interrupted.ckpt")
    step = torch.load(stopped, weights_only=True)["global_step"]
    assert process.returncode == 130 and 2 <= step < 40 and "Traceback" not in errors
    assert f"to continue, repeat the command with --ckpt_path {stopped}" in errors
    whole = fit(tiny_model_path, tiny_data, tmp_path / "whole", options)
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", "last"])
    assert_same_ending(whole, resumed, step)


def test_a_run_that_went_on_from_the_end_of_an_epoch_can_be_gone_on_from_at_the_end_of_another(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Lightning counts one epoch too few in such a run; its successor would train the last epoch twice."""
    options = ["--model.lora.r", "4", "--trainer.max_epochs", "3", *EVERY_STEP, *RECORDED]
    whole = before = fit(tiny_model_path, tiny_data, tmp_path, options)
    for step in (8, 16):
        resume = [*options, "--ckpt_path", str(checkpoint_at(before, step))]
        before = fit(tiny_model_path, tiny_data, tmp_path, resume)
        assert_same_ending(whole, before, step)
    for _ in range(2):  # nothing is left to train; the policy is exported all the same
        before = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", _last(before)])
        assert not list((before / "pairs").glob("*"))
        ours, theirs = (load_file(run / "policy" / "adapter_model.safetensors") for run in (before, whole))
        assert_identical(ours, theirs)


def _last(run: Path) -> str:
    """The run's last checkpoint; `last` where it wrote none."""
    path = run / "checkpoints" / "last.ckpt"
    return str(path) if path.exists() else "last"


@pytest.fixture(scope="module")
def trained(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """Options, and a run of two epochs with a checkpoint after every step."""
    root = tmp_path_factory.mktemp("trained")
    options = ["--model.lora.r", "4", "--trainer.max_epochs", "2", *EVERY_STEP, *RECORDED]
    options += ["--data.cache_dir", str(root / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gamma_po"])
        return options, fit(tiny_model_path, tiny_data, root, options)


FORMATS = {
    "newer": (lambda c: c.update({FORMAT_KEY: 99}), r"its format is 99, newer than this program: install the version"),
    "none": (lambda c: c.pop(FORMAT_KEY), r"does not say its format: .* from before formats had numbers; allowed"),
    "unknown": (lambda c: c.update({FORMAT_KEY: "x"}), r"its format 'x' is not known; allowed: format 1"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_a_checkpoint_of_another_format_is_refused_by_fit_by_export_and_when_it_is_loaded(
    case: str, trained: tuple[list[str], Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, whole = trained
    change, message = FORMATS[case]
    checkpoint = torch.load(checkpoint_at(whole, 3), weights_only=True)
    change(checkpoint)
    path = tmp_path / "other.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(path)
    with pytest.raises(ConfigError, match=message):
        fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", str(path)])
    module = run("validate", tiny_model_path, tiny_data, tmp_path, ["--model.lora.r", "4"]).cli.model
    with pytest.raises(ConfigError, match=message):
        module.on_load_checkpoint(checkpoint)


def test_last_and_best_mean_the_runs_of_the_same_name_and_are_checked_as_files_are(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.max_epochs", "2", *RECORDED, "--checkpoint.monitor", "val/loss"]
    whole = fit(tiny_model_path, tiny_data, tmp_path / "whole", [*options, "--checkpoint.save_top_k", "-1"])
    short = [*options, "--ckpt_path", "last"]  # nothing there: starts
    first = fit(tiny_model_path, tiny_data, tmp_path, [*short, "--checkpoint.every_n_train_steps", "3"])
    for last in first.glob("checkpoints/last.ckpt"):
        last.write_bytes(next((whole / "checkpoints").glob("*step=8.ckpt")).read_bytes())
    (tmp_path / "runs" / "run" / "not-a-run").mkdir()
    resumed = fit(tiny_model_path, tiny_data, tmp_path, short)
    assert_same_ending(whole, resumed, 8)
    changed = arguments(tiny_model_path, tiny_data, tmp_path, [*short, "--model.loss.beta", "0.7"])
    assert run_command(["fit", *changed]) == 2
    assert "model.loss.beta: 0.1 in the checkpoint, 0.7 here" in capsys.readouterr().err
    best = last_state(resumed)["callbacks"]["RunCheckpoint"]["best_model_path"]
    run("validate", tiny_model_path, tiny_data, tmp_path, ["--ckpt_path", "best"])
    assert Path(best).parent == resumed / "checkpoints"
    empty = arguments(tiny_model_path, tiny_data, tmp_path / "none", ["--ckpt_path", "last"])
    assert run_command(["test", *empty]) == 2
    assert "no run in" in capsys.readouterr().err


class Told(Callback):
    """Sends a signal to its own process in the middle of a step or of a validation; named on the command line."""

    def __init__(self, number: int, step: int, inside: Literal["step", "validation", "start"], rank: int = 0) -> None:
        self.number, self.step, self.inside, self.rank = number, step, inside, rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer, "start", trainer.global_step == self.step)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._send(trainer, "step", trainer.global_step == self.step)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, i: int) -> None:
        assert i <= 1 or self.step != trainer.global_step, "the validation goes on"
        self._send(trainer, "validation", i == 1 and trainer.global_step == self.step)

    def _send(self, trainer: Trainer, here: str, now: bool) -> None:
        if here == self.inside and now and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def told(number: int, *, step: int, inside: str, rank: int = 0) -> list[str]:
    """Options that send a signal after so many steps."""
    options = ["--trainer.callbacks", "tests.integration.test_interruption.Told"]
    for name, value in {"number": int(number), "step": step, "inside": inside, "rank": rank}.items():
        options += [f"--trainer.callbacks.{name}", str(value)]
    return options


@pytest.mark.parametrize("case", ["between epochs", "inside an epoch", "of steps in two parts"])
def test_a_signal_in_a_validation_stops_it_with_the_state_of_the_step_before(
    case: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, step = {
        "between epochs": ([], 8),
        "inside an epoch": (["--trainer.val_check_interval", "3"], 11),
        "of steps in two parts": (["--trainer.val_check_interval", "4", "--trainer.accumulate_grad_batches", "2"], 2),
    }[case]
    options = [*options, *LORA, "--trainer.max_epochs", "2", *RECORDED, "--data.eval_batch_size", "2"]
    options += ["--data.cache_dir", str(tmp_path / "cache")]
    whole = fit(tiny_model_path, tiny_data, tmp_path / "whole", options)
    stop = told(signal.SIGTERM, step=step, inside="validation")
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, [*options, *stop])]) == 130
    (stopped,) = (tmp_path / "runs" / "run").iterdir()
    state = torch.load(stopped / "checkpoints" / "interrupted.ckpt", weights_only=True)
    assert state["global_step"] == step
    resumed = fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", "last"])
    assert_same_ending(whole, resumed, step)
    before, every = steps_of(stopped, "val/loss"), steps_of(whole, "val/loss")
    del every[len(before)]  # the one cut short: Lightning goes on behind it
    assert before + steps_of(resumed, "val/loss") == every


def test_a_signal_between_the_loading_of_a_checkpoint_and_the_first_step_is_ours(
    trained: tuple[list[str], Path],
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the barrier behind it, where Lightning's handlers would be in place, and no hook has been called yet."""
    options, whole = trained
    before = signal.getsignal(signal.SIGTERM)

    def told_there(strategy: SingleDeviceStrategy, name: str | None = None) -> None:
        if name == "run-stage":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SingleDeviceStrategy, "barrier", told_there)
    resume = [*options, "--ckpt_path", str(checkpoint_at(whole, 3))]
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, resume)]) == 130
    (stopped,) = (tmp_path / "runs" / "run").iterdir()
    assert "stopped before the first step" in caplog.text and not list(stopped.rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_nothing_is_left_to_train_a_signal_stops_at_once(
    trained: tuple[list[str], Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, whole = trained
    resume = [*options, "--trainer.max_epochs", "-1", "--trainer.max_steps", "16"]
    resume += ["--ckpt_path", str(checkpoint_at(whole, 16))]
    resume += ["--trainer.callbacks", "tests.integration.test_interruption.ToldAtTheEnd"]
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, resume)]) == 130
    assert not list(tmp_path.glob("runs/run/*/policy"))


class ToldAtTheEnd(Callback):
    """Sends a signal to its own process behind the training."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


SLURM = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_ID": "4711", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}
SLURM |= {"NODEID": "0", "NNODES": "1"}


def test_in_a_slurm_job_a_signal_stops_between_steps_and_lightnings_own_checkpoints_are_neither_written_nor_read(
    trained: tuple[list[str], Path],
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options, whole = trained
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "hpc_ckpt_1.ckpt"  # of any other run that was started in this folder
    other.write_bytes(checkpoint_at(whole, 3).read_bytes())
    stop = told(signal.SIGUSR1, step=5, inside="step")
    assert run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, [*options, *stop])]) == 130
    (stopped,) = (tmp_path / "runs" / "run").iterdir()
    assert steps_of(stopped, "train/loss") == steps_of(whole, "train/loss")[:6]  # the sixth was under way
    assert list(tmp_path.rglob("hpc_ckpt*")) == [other] and "let the batch script then call `scontrol" in caplog.text
    step = torch.load(stopped / "checkpoints" / "interrupted.ckpt", weights_only=True)["global_step"]
    assert_same_ending(whole, fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", "last"]), step)
    given = arguments(tiny_model_path, tiny_data, tmp_path, [*options, "--trainer.default_root_dir", str(tmp_path)])
    assert run_command(["fit", *given]) == 2
    assert "holds 'hpc_ckpt_1.ckpt', which Lightning loads by itself" in capsys.readouterr().err


def test_the_module_checks_what_is_loaded_whoever_says_what_that_is(
    trained: tuple[list[str], Path],
    tiny_model_path: str,
    tiny_data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, whole = trained
    monkeypatch.setattr(PreferenceCLI, "_parse_ckpt_path", lambda cli: setattr(cli, "checkpoint_found", "none"))
    resume = [*options, "--ckpt_path", str(checkpoint_at(whole, 3))]
    assert_same_ending(whole, fit(tiny_model_path, tiny_data, tmp_path, resume), 3)
    for change, message in {
        ("--model.optimizer.lr", "0.1"): "optimizer.lr: 0.003 in the checkpoint, 0.1 here",
        ("--trainer.gradient_clip_val", "1.0"): "gradient_clip_val=not set, this run has gradient_clip_val=1.0",
        ("--trainer.max_epochs", "3"): "steps_in_all=16, this run has steps_in_all=24",
        ("--data.layout", "packed"): "layout=padded, this run has layout=packed",
        ("--trainer.precision", "bf16-mixed"): "precision=32-true, this run has precision=bf16-mixed",
        ("--model.policy.dtype", "bfloat16"): "model.policy.dtype: float32 in the checkpoint, bfloat16 here",
    }.items():
        with pytest.raises(ConfigError, match=message):
            fit(tiny_model_path, tiny_data, tmp_path, [*resume, *change])


def test_with_resume_anyway_the_training_goes_on_behind_the_same_pairs_with_the_options_given(
    trained: tuple[list[str], Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, whole = trained
    changed = [*options, "--data.batch_size", "8", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "3"]
    changed += [
        "--model.schedule",
        "constant",
        "--model.warmup_ratio",
        "0",
        "--ckpt_path",
        str(checkpoint_at(whole, 6)),
    ]
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.003 in .*; --resume anyway goes on all the same"):
        fit(tiny_model_path, tiny_data, tmp_path, changed)
    done = run("fit", tiny_model_path, tiny_data, tmp_path, [*changed, "--resume", "anyway"])
    before, after = rows_by_step(whole), rows_by_step(done.trainer_dir)
    seen = [row for name in sorted(before)[:6] for row in before[name]]
    rest = after["step-000007.parquet"]  # 32 pairs in an epoch, 24 are done: one batch of 8 is left
    assert sorted(seen + rest) == list(range(32)) and len(after) == 1 + 2 * 4
    assert {group["lr"] for group in done.cli.trainer.optimizers[0].param_groups} == {0.01}
    other = [*changed, "--resume", "anyway", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    with pytest.raises(ConfigError, match=r"optimizer.class_path: AdamW in the checkpoint, SGD here"):
        fit(tiny_model_path, tiny_data, tmp_path, other)


def test_accumulation_that_follows_the_epoch_is_refused(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    scheduler = f"{GradientAccumulationScheduler.__module__}.GradientAccumulationScheduler"
    for scheduling in ("{0: 1, 1: 2}", "{0: 2}"):
        options = ["--trainer.callbacks", scheduler, "--trainer.callbacks.scheduling", scheduling]
        with pytest.raises(
            ConfigError, match=r"GradientAccumulationScheduler.*allowed: trainer.accumulate_grad_batches"
        ):
            fit(tiny_model_path, tiny_data, tmp_path, options)


class Torn(Exception):
    """Stands for the end of a process."""


class Saver:
    """A trainer that writes a file, or a folder of shards, and may end in the middle."""

    is_global_zero = True
    checkpoint_io = None

    def __init__(self, content: str, *, shards: bool, torn: bool = False) -> None:
        self.content, self.shards, self.torn = content, shards, torn
        self.strategy = self._checkpoint_connector = self  # of a trainer

    def dump_checkpoint(self, weights_only: bool) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        if self.shards:
            path.mkdir()
            (path / "a").write_text(self.content)
        else:
            path.write_text(self.content)
        if self.torn:
            raise Torn
        if self.shards:
            (path / "b").write_text(self.content)


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(shards: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def content() -> set[str]:
        return {file.read_text() for file in ([path / "a", path / "b"] if shards else [path])}

    save_whole(Saver("one", shards=shards), path)
    with pytest.raises(Torn):
        save_whole(Saver("two", shards=shards, torn=True), path)
    assert content() == {"one"}
    save_whole(Saver("three", shards=shards), path)
    assert content() == {"three"} and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(Torn):
        save_whole(Saver("four", shards=shards, torn=True), tmp_path / "other.ckpt")
    assert len(list(tmp_path.iterdir())) > 1
    tidy(tmp_path)
    assert content() == {"three"} and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


WRITER = """
import sys, time
from pathlib import Path
from gamma_po.files import being_written

path = Path(sys.argv[1])
with being_written(path):
    path.mkdir()
    (path / "half").write_text("of it")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("policy.partial", "last.ckpt.partial")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment)
        for path in paths
    ]
    try:
        for writer in writers:
            assert writer.stdout.read(7) == b"writing"
        (tmp_path / "unsigned.partial").touch()
        writers[1].kill()
        writers[1].wait()
        tidy(tmp_path, for_seconds=ABANDONED)
        assert all((path / "half").is_file() for path in paths)
        for path in tmp_path.rglob("*"):
            os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
        tidy(tmp_path, for_seconds=ABANDONED)
        assert [(path / "half").is_file() for path in paths] == [True, False]
        assert len(list(tmp_path.iterdir())) == 3  # with the sign of the living one
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    export_policy(tiny_model(), tiny_tokenizer(), tmp_path / "policy")
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "unsigned.partial"}


def left_over(path: Path, *, seconds: float) -> None:
    """A folder as a process leaves it that is killed while it writes, so long ago."""
    path.mkdir()
    for file in (path / "half", path.with_name(f".{path.name}.writing")):
        file.touch()
    for file in (path, path / "half", path.with_name(f".{path.name}.writing")):
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_run_removes_what_others_of_its_name_were_writing_when_they_were_killed_long_ago(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "runs" / "run" / "20260101-000000"
    (other / "checkpoints").mkdir(parents=True)
    for name in RECORDS:
        (other / name).write_text("{}")
    left_over(other / "policy.partial", seconds=2 * ABANDONED)
    left_over(other / "checkpoints" / "interrupted.ckpt.partial", seconds=2 * ABANDONED)
    left_over(other / "checkpoints" / "last.ckpt.partial", seconds=ABANDONED / 2)
    fit(tiny_model_path, tiny_data, tmp_path, ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    assert {path.name for path in other.iterdir()} == {*RECORDS, "checkpoints"}
    kept = {path.name for path in (other / "checkpoints").iterdir()}
    assert kept == {"last.ckpt.partial", ".last.ckpt.partial.writing"}


def test_shards_that_were_replaced_are_removed_where_the_process_was_killed_before_it_could(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.partial.writing").touch()
    for name in ("last.ckpt", "last.ckpt.previous", "other.ckpt.previous"):
        (tmp_path / name).mkdir()
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "other.ckpt.previous"}


def test_the_shards_before_stay_until_the_new_ones_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_whole(Saver("one", shards=True), tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").rename(tmp_path / "last.ckpt.previous")  # as a process leaves it, killed between two names

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gamma_po.checkpoints.os.replace", killed)
        save_whole(Saver("two", shards=True), tmp_path / "last.ckpt")
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt.previous"]
    assert {file.read_text() for file in (tmp_path / "last.ckpt.previous").iterdir() if file.name in "ab"} == {"one"}


def test_a_sign_that_another_process_removes_while_one_waits_for_it_is_made_again(tmp_path: Path) -> None:
    path, sign = tmp_path / "last.ckpt.partial", tmp_path / ".last.ckpt.partial.writing"
    with ThreadPoolExecutor(1) as pool:
        with open(sign, "ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            seen = pool.submit(written, path)
            time.sleep(0.2)
            assert not seen.done()
            sign.unlink()
        assert seen.result(timeout=30) == []  # what would be removed while it writes


def written(path: Path) -> list[Path]:
    """What is taken for abandoned while a file is written."""
    with being_written(path):
        path.touch()
        found = list(abandoned(path.parent))
        assert path.with_name(f".{path.name}.writing").exists()
        path.unlink()
        return found


def test_a_run_that_may_not_be_read_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("mine", "theirs"):
        (tmp_path / folder).mkdir()
        for name in RECORDS:
            (tmp_path / folder / name).touch()
    is_file = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "theirs":
            raise PermissionError(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert runs_in(tmp_path) == [tmp_path / "mine"]


class Dropping(Callback):
    """Is told to stop where what is raised is dropped, as in a finalizer."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_a_signal_that_is_dropped_before_training_stops_it_before_the_first_step(tmp_path: Path) -> None:
    kept = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, callbacks=[StopBetweenSteps(), Dropping()], default_root_dir=tmp_path, **kept)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(BoringModel())
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert trainer.global_step == 0


class Failing(Callback):
    """Ends a training with an error."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: object) -> None:
        raise ArithmeticError


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end"])
def test_after_an_error_the_signals_are_as_before_and_a_validation_has_its_own(hook: str, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    kept = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, callbacks=[StopBetweenSteps(), Failing(hook)], default_root_dir=tmp_path, **kept)
    with pytest.raises(ArithmeticError):
        trainer.fit(BoringModel())
    assert [signal.getsignal(number) for number in SIGNALS] == before
    trainer.validate(BoringModel(), verbose=False)
    assert [signal.getsignal(number) for number in SIGNALS] == before


class Refused(Saver):
    """Writes half of its checkpoint on a disk that takes no more."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            super().save_checkpoint(checkpoint, path)
        except Torn as error:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_what_a_full_disk_leaves_unfinished_is_removed_and_a_missing_folder_is_made(
    shards: bool, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_whole(Saver("one", shards=shards), path)
    with pytest.raises(OSError, match="No space left"):
        save_whole(Refused("two", shards=shards, torn=True), path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_goes_straight_into_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-such-folder"))
    kept = {"weight": torch.arange(5.0)}
    StraightToFile().save_checkpoint(kept, tmp_path / "a.ckpt")
    assert_identical(torch.load(tmp_path / "a.ckpt", weights_only=True), kept)
    with pytest.raises(OSError, match="No space left"):  # where torch complains of a position
        StraightToFile().save_checkpoint({"weight": torch.zeros(10**6)}, Path("/dev/full"))


def test_the_checkpoint_with_the_most_steps_is_taken_whatever_it_is_called(
    trained: tuple[list[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "20260101-000000"
    (folder / "checkpoints").mkdir(parents=True)
    for name in RECORDS:
        (folder / name).write_text("{}")

    def put(name: str, step: int) -> Path:
        return Path(shutil.copy(checkpoint_at(trained[1], step), folder / "checkpoints" / name))

    put("epoch=0-step=3.ckpt", 3)
    numbered = put("epoch=1-step=11.ckpt", 11)
    assert named_checkpoint("last", folder.parent) == find_checkpoint(str(folder)) == numbered
    interrupted = put("interrupted.ckpt", 13)
    assert named_checkpoint("last", folder.parent) == find_checkpoint(str(folder)) == interrupted
    last = put("last.ckpt", 12)
    assert named_checkpoint("last", folder.parent) == find_checkpoint(str(folder)) == interrupted
    interrupted.unlink()
    assert named_checkpoint("last", folder.parent) == find_checkpoint(str(folder)) == last


def test_a_last_checkpoint_that_is_a_link_is_refused(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.save_last='?link'?: .*allowed: true, false|save_last=.*link"):
        fit(tiny_model_path, tiny_data, tmp_path, ["--checkpoint.save_last", "link"])


@pytest.mark.parametrize("step", [3, 8], ids=["inside an epoch", "between epochs"])
def test_a_training_does_not_go_on_with_other_pairs_or_another_start(
    step: int, trained: tuple[list[str], Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, whole = trained
    resume = [*options, "--ckpt_path", str(checkpoint_at(whole, step))]
    other = write_rows(tmp_path / "other.jsonl", tiny_rows(32, seed=9))
    with pytest.raises(ConfigError, match=r"written with data=\w{16}, this run has data=\w{16}: it would not continue"):
        fit(tiny_model_path, tiny_data, tmp_path, [*resume, "--data.train", str(other)])
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"a reference of other weights \(fingerprint \w{12} in training, \w{12} he"):
        fit(str(tmp_path / "model"), tiny_data, tmp_path, resume)
    moved = shutil.copytree(tiny_model_path, tmp_path / "moved")
    assert_same_ending(whole, fit(str(moved), tiny_data, tmp_path, resume), step)


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_run_directory_from_elsewhere_runs_no_code_and_leads_to_no_other_file(
    trained: tuple[list[str], Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options, whole = trained
    run_ = tmp_path / "runs" / "run" / "20990101-000000"
    (run_ / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        (run_ / name).write_text("!!python/object/apply:pathlib.Path.touch [ran]")
    checkpoint = torch.load(checkpoint_at(whole, 3), weights_only=True)
    best = checkpoint["callbacks"]["RunCheckpoint"]
    best["best_model_path"] = str(checkpoint_at(whole, 5))  # is there, but in another run
    torch.save(checkpoint, run_ / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="has no best checkpoint; allowed: last, or a file"):
        fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", "best"])
    torch.save(checkpoint | {"extra": Evil(tmp_path / "ran")}, run_ / "checkpoints" / "last.ckpt")
    for path in ("last", str(run_ / "checkpoints" / "last.ckpt")):
        with pytest.raises(ConfigError, match="loading these can run code"):
            fit(tiny_model_path, tiny_data, tmp_path, [*options, "--ckpt_path", path])
    assert not list(tmp_path.rglob("ran")) and not Path("ran").exists()


def test_shards_that_wait_for_their_successor_are_found(trained: tuple[list[str], Path], tmp_path: Path) -> None:
    """A process killed between two renames leaves no `last.ckpt`."""
    waiting = tmp_path / "checkpoints" / "last.ckpt.previous"
    waiting.mkdir(parents=True)
    torch.save(torch.load(checkpoint_at(trained[1], 5), weights_only=True), waiting / "meta.pt")
    found = furthest_checkpoint(tmp_path)
    assert found is not None and (found.path, found.step) == (waiting, 5)

"""What one process finds wrong, or is told, ends all of them with the same message; none is left waiting."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint import FileSystemWriter

from experiments.soak.attempts import held_port
from gamma_po.checkpoints import StraightToFile
from gamma_po.continuation import Continuation
from gamma_po.errors import ConfigError, DataError
from gamma_po.ranks import Gathered, Local, Ranks, as_one
from tests.integration.test_interruption import told
from tests.processes import ROOT, two_processes
from tests.runs import arguments, steps_of
from tests.tiny import tiny_rows, write_rows

TIMEOUT = 600  # seconds for all that happens in one test, on a busy machine
POLLED = 0.05  # seconds between two looks for a file that another process will write

# Not started by torchrun: it would end the other process, and a hang would not show.
SCRIPT = """
import contextlib, io, json, os, sys, time
from pathlib import Path
import pytest
from tests.integration.test_errors_of_one_rank import only_here
from tests.runs import draw_no_figures
from gamma_po.cli import run

draw_no_figures(pytest.MonkeyPatch())
rank, found = int(os.environ["LOCAL_RANK"]), {}
for name, command in json.loads(Path(sys.argv[1]).read_text()).items():
    sys.argv[1:] = []
    said = io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stderr(said), only_here(name, rank):
        status = run([word.replace("RANK", str(rank)).replace("NEXT", str(rank + 1)) for word in command])
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("error: ", "stopped: "))]
    found[name] = {"status": status, "said": lines, "seconds": time.monotonic() - began}
Path(os.environ["FOUND"], f"rank{rank}.json").write_text(json.dumps(found))
"""


class Spoiled(Callback):
    """Breaks the weights of the second process before a step; named on the command line."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spoil(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._spoil(trainer, pl_module, batch_idx)

    def _spoil(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if trainer.global_rank == 1 and step == self.step:
            with torch.no_grad():
                pl_module.policy.model.model.layers[0].input_layernorm.weight.fill_(self.value)


@contextlib.contextmanager
def only_here(name: str, rank: int) -> Iterator[None]:
    """What is wrong in one process only, where no option can bring it about."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "no room" and rank == 0:
            usage = shutil.disk_usage("/")._replace(free=0)
            patch.setattr(shutil, "disk_usage", lambda _: usage)
        if name == "disk full" and rank == 0:
            patch.setattr(StraightToFile, "save_checkpoint", refuse)
        if name == "disk full for a shard" and rank == 1:
            patch.setattr(FileSystemWriter, "write_data", refuse)
        yield


def refuse(*_: Any, **__: Any) -> None:
    """Stands for a disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")


def two_bare_processes(script: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Start two ranks that nobody looks after."""
    with held_port() as held:
        port = str(held.getsockname()[1])
        common = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"NODE_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **environment}
        return [
            subprocess.Popen(
                [sys.executable, *script], cwd=ROOT, env={**common, "LOCAL_RANK": rank, "RANK": rank}, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[held.fileno()],
            )
            for rank in "01"
        ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for both; return what they said."""
    try:
        return [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


CASES = {
    "bad row": (2, "error: ", "pairs-1.jsonl, row 3 (line 3): rejected is empty"),
    "no room": (2, "error: ", "has 0 MiB free, the reference cache needs"),
    "not the reference": (2, "error: ", "before the first step, policy and reference differ by"),
    "not finite": (1, "stopped: ", "the reward margin is not finite for the pairs in rows ["),
    "disk full": (1, "stopped: ", "No space left on device: 'last.ckpt'; the disk takes no more"),
    "disk full for a shard": (1, "stopped: ", "No space left on device: 'last.ckpt'; the disk takes no more"),
}
SHARDS = ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2"]
SHARDS += ["--trainer.strategy.tensor_parallel_size", "1"]
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2", "--trainer.max_steps", "4"]


def found_by_both(commands: dict[str, list[str]], folder: Path) -> list[dict[str, Any]]:
    """Run commands one after the other on two ranks; return status, message and seconds of each, by rank."""
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "script.py").write_text(SCRIPT)
    script = [str(folder / "script.py"), str(folder / "commands.json")]
    two_processes(script, FOUND=str(folder))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_an_error_of_one_process_ends_both_at_once_with_its_message(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    rows = tiny_rows(8)
    write_rows(tmp_path / "pairs-0.jsonl", rows)
    rows[2]["rejected"] = " "
    write_rows(tmp_path / "pairs-1.jsonl", rows)
    spoiled = ["--trainer.callbacks", "tests.integration.test_errors_of_one_rank.Spoiled"]
    options = {
        "no room": [*DDP, "--data.cache_dir", str(tmp_path / "full")],
        "bad row": [*DDP, "--data.train", str(tmp_path / "pairs-RANK.jsonl")],
        "not the reference": [*DDP, *spoiled, "--trainer.callbacks.step", "0", "--trainer.callbacks.value", "3.0"],
        "not finite": [*DDP, *spoiled, "--trainer.callbacks.step", "2", "--trainer.callbacks.value", ".nan"],
        "disk full": [*DDP, "--checkpoint.every_n_train_steps", "2"],
        "disk full for a shard": [*DDP, *SHARDS, "--checkpoint.every_n_train_steps", "2"],
    }
    commands = {n: ["fit", *arguments(tiny_model_path, tiny_data, tmp_path, o)] for n, o in options.items()}
    found = found_by_both(commands, tmp_path)
    for name, (status, kind, message) in CASES.items():
        for rank in (0, 1):
            assert found[rank][name]["status"] == status, (name, rank, found[rank][name])
            assert found[rank][name]["said"] == found[0][name]["said"]
        (line,) = found[0][name]["said"]
        assert line.startswith(kind) and message in line, line


def test_processes_that_find_different_checkpoints_do_not_start(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """As with a stale listing of a shared folder, `runs` on the nodes' own disks, or a run that is still ending."""
    kept = ["--checkpoint.dirpath", str(tmp_path / "kept"), "--checkpoint.filename", "{step}"]
    seen = [*DDP, "--run.root", str(tmp_path / "seen-RANK"), "--trainer.limit_val_batches", "0"]
    options = {
        "first": [*seen, "--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1", *kept],
        "own folder": [*seen, "--checkpoint.every_n_train_steps", "2"],
        "not seen": [*seen, "--ckpt_path", "last"],
        "other step": [*seen, "--ckpt_path", str(tmp_path / "kept" / "step=NEXT.ckpt")],
        "the same": [*seen, "--ckpt_path", str(tmp_path / "kept" / "step=3.ckpt")],
        # Here, because processes are slow to start: one of two is told to stop while both validate.
        "told": [*DDP, "--trainer.val_check_interval", "2", "--data.eval_batch_size", "1", "--run.name", "told"],
        "told at the start": [*DDP, "--ckpt_path", str(tmp_path / "kept" / "step=3.ckpt"), "--run.name", "early"],
    }
    options["told"] += told(signal.SIGTERM, step=2, inside="validation", rank=1)
    options["told at the start"] += told(signal.SIGTERM, step=3, inside="start", rank=1)
    commands = {n: ["fit", *arguments(tiny_model_path, tiny_data, tmp_path, o)] for n, o in options.items()}
    here, there = found_by_both(commands, tmp_path)
    assert [here[name]["status"] for name in options] == [0, 0, 2, 2, 0, 130, 130] and here.keys() == there.keys()
    for name in options:
        assert there[name]["status"] == here[name]["status"] and there[name]["said"] == here[name]["said"]
    digest = r"contents \w{12}"
    (line,) = here["not seen"]["said"]
    last = rf"{tmp_path}/seen-0/run/\S+/checkpoints/last.ckpt"
    assert re.search(rf"different checkpoints: process 0 {last} \(step 4, {digest}\); process 1 none; ", line)
    (line,) = here["other step"]["said"]
    steps = [rf"process {i} {tmp_path}/kept/step={i + 1}.ckpt \(step {i + 1}, {digest}\)" for i in (0, 1)]
    assert re.search(f"different checkpoints: {steps[0]}; {steps[1]}; allowed", line)
    (stopped,) = (tmp_path / "runs" / "told").glob("*/checkpoints/interrupted.ckpt")
    assert torch.load(stopped, weights_only=True)["global_step"] == 2
    (early,) = (tmp_path / "runs" / "early").iterdir()
    assert not list(early.rglob("*.ckpt"))


def test_a_checkpoint_replaced_while_the_processes_load_it_is_noticed() -> None:
    module = SimpleNamespace(_trainer=Trainer(logger=False), ranks=Scripted(0, [b"step 8\x00"]))
    with pytest.raises(ConfigError, match="different checkpoints: process 0 step 7; process 1 step 8"):
        Continuation().check(module, {"global_step": 7})
    with pytest.raises(ConfigError, match="format"):  # what is looked at next
        Continuation().check(module, {"global_step": 8})


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step_with_a_checkpoint(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2", "--model.lora.r", "4"]
    options += ["--model.lora.dropout", "0.1", "--pair_recorder.every_n_steps", "1", "--trainer.max_epochs", "40"]
    options += ["--trainer.limit_val_batches", "0"]
    command = ["-m", "gamma_po", "fit", *arguments(tiny_model_path, tiny_data, tmp_path, options)]
    processes = two_bare_processes(command, XDG_CACHE_HOME=str(tmp_path / "cache"))
    folder = tmp_path / "runs" / "run"
    while not list(folder.glob("*/pairs/step-000002*.parquet")):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(POLLED)
    processes[1].send_signal(signal.SIGTERM)
    said = ended(processes)
    (run,) = folder.iterdir()
    state = torch.load(run / "checkpoints" / "interrupted.ckpt", weights_only=True)
    assert 2 <= state["global_step"] < 320 and f"stopped after step {state['global_step']}" in said[0]
    assert len(steps_of(run, "train/loss")) == state["global_step"]
    assert all("Traceback" not in text for text in said) and [p.returncode for p in processes] == [130, 130]
    assert {"optimizer_states", "loops", "margin_state", "run"} <= state.keys()


class Scripted(Ranks):
    """One of several ranks, of which all bytes that the others say are known."""

    def __init__(self, rank: int, others: list[bytes]) -> None:
        self.rank, self.world_size, self.others = rank, len(others) + 1, others

    def gather(self, values: torch.Tensor) -> Gathered:
        parts = [torch.tensor(list(said), dtype=torch.uint8) for said in self.others]
        parts.insert(self.rank, values)
        return Gathered(torch.cat(parts), sum(map(len, parts[: self.rank])))


def test_a_rank_raises_what_another_has_said_or_else_nothing() -> None:
    with as_one(Scripted(0, [b""])):
        pass
    with pytest.raises(DataError, match=r"^pairs, row 3$"), as_one(Scripted(0, [b"1 0 pairs, row 3\x00"])):
        pass
    with (
        pytest.raises(ConfigError, match=r"^mine; and on another process: theirs$"),
        as_one(Scripted(0, [b"2 0 theirs\x00"])),
    ):
        raise ConfigError("mine")
    with pytest.raises(DataError, match=r"^alone$"), as_one(Local()):
        raise DataError("alone")
    with (
        pytest.raises(OSError, match=r"^\[Errno 28\] full$") as full,
        as_one(Scripted(1, [b"3 28 [Errno 28] full\x00"])),
    ):
        pass
    assert full.value.errno == errno.ENOSPC  # by which the command line knows a full disk
    with pytest.raises(ZeroDivisionError), as_one(Scripted(1, [b""])):  # what nobody foresaw is not caught
        _ = 1 / 0

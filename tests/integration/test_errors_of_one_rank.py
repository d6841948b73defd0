"""What one process finds wrong, or is told, ends all of them with the same message; none is left waiting."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.errors import ConfigError, DataError
from gamma_po.ranks import Gathered, Local, Ranks, as_one
from tests.integration.test_ranks import ROOT
from tests.runs import arguments, steps_of
from tests.tiny import tiny_rows, write_rows

TIMEOUT = 600  # seconds for all that happens in one test, on a busy machine

# Started twice by hand: torchrun would end the other process, and a hang would not show.
SCRIPT = """
import contextlib, io, json, os, sys, time
from pathlib import Path
from tests.integration.test_errors_of_one_rank import only_here
from gamma_po.cli import run

rank, found = int(os.environ["LOCAL_RANK"]), {}
for name, command in json.loads(Path(sys.argv[1]).read_text()).items():
    sys.argv[1:] = []
    said = io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stderr(said), only_here(name, rank):
        status = run([word.replace("RANK", str(rank)) for word in command])
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
        yield


def two_bare_processes(script: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """Start two ranks that nobody looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    common |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **environment}
    return [
        subprocess.Popen(
            [sys.executable, *script], cwd=ROOT, env={**common, "LOCAL_RANK": rank, "RANK": rank}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
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
}


def test_an_error_of_one_process_ends_both_at_once_with_its_message(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    rows = tiny_rows(8)
    write_rows(tmp_path / "pairs-0.jsonl", rows)
    rows[2]["rejected"] = " "
    write_rows(tmp_path / "pairs-1.jsonl", rows)
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2", "--trainer.max_steps", "4"]
    spoiled = ["--trainer.callbacks", "tests.integration.test_errors_of_one_rank.Spoiled"]
    options = {
        "no room": [*ddp, "--data.cache_dir", str(tmp_path / "full")],
        "bad row": [*ddp, "--data.train", str(tmp_path / "pairs-RANK.jsonl")],
        "not the reference": [*ddp, *spoiled, "--trainer.callbacks.step", "0", "--trainer.callbacks.value", "3.0"],
        "not finite": [*ddp, *spoiled, "--trainer.callbacks.step", "2", "--trainer.callbacks.value", ".nan"],
    }
    commands = {n: ["fit", *arguments(tiny_model_path, tiny_data, tmp_path, o)] for n, o in options.items()}
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    (tmp_path / "script.py").write_text(SCRIPT)
    script = [str(tmp_path / "script.py"), str(tmp_path / "commands.json")]
    said = ended(two_bare_processes(script, FOUND=str(tmp_path)))
    assert all((tmp_path / f"rank{rank}.json").is_file() for rank in (0, 1)), said[0][-3000:] + said[1][-3000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name, (status, kind, message) in CASES.items():
        for rank in (0, 1):
            assert found[rank][name]["status"] == status, (name, rank, found[rank][name])
            assert found[rank][name]["said"] == found[0][name]["said"]
        (line,) = found[0][name]["said"]
        assert line.startswith(kind) and message in line, line


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
    with pytest.raises(DataError, match=r"^pairs, row 3$"), as_one(Scripted(0, [b"1 pairs, row 3\x00"])):
        pass
    with (
        pytest.raises(ConfigError, match=r"^mine; and on another process: theirs$"),
        as_one(Scripted(0, [b"2 theirs\x00"])),
    ):
        raise ConfigError("mine")
    with pytest.raises(DataError, match=r"^alone$"), as_one(Local()):
        raise DataError("alone")
    with pytest.raises(ZeroDivisionError), as_one(Scripted(1, [b""])):  # what nobody foresaw is not caught
        _ = 1 / 0

"""Two processes that share the weights, killed at random moments: shards are whole or absent, the ending the same."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed import TCPStore
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

from experiments.soak.attempts import Attempt, held_port
from experiments.soak.comparison import Broken, check_whole, read_trained
from gamma_po.callbacks.checkpoint import RunCheckpoint
from gamma_po.checkpoints import StraightToFile
from gamma_po.files import ABANDONED
from tests.integration.test_interruption import left_over, soak
from tests.integration.test_sharding import HALVED, STRATEGY
from tests.same import assert_identical

FSDP2 = [*HALVED, STRATEGY, "ModelParallelStrategy", f"{STRATEGY}.data_parallel_size", "2"]
FSDP2 += [f"{STRATEGY}.tensor_parallel_size", "1", "--weights_only", "false"]


def test_a_training_that_shares_the_weights_killed_at_random_moments_ends_with_the_same_bits(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*FSDP2, "--trainer.limit_val_batches", "0", "--data.validation", "null", "--data.test", "null"]
    options += ["--checkpoint.every_n_train_steps", "1", "--trainer.accumulate_grad_batches", "3"]
    options += ["--trainer.max_epochs", "3"]
    how = ["--kills", "2", "--seed", "11", "--processes", "2", "--victims", "either", "--grace", "20"]
    how += ["--after-first-checkpoint", "--mean", "2"]
    figures = soak(tiny_model_path, tiny_data, tmp_path, how, options)
    assert figures["kills"] == 2 and figures["restarts_at_the_last_checkpoint"] >= 1


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint in shards, where a series of attempts has it."""
    folder = tmp_path / "runs" / "run" / "20260101-000000" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    trained = {"state_dict": {"a": torch.arange(300.0)}, "optimizer_0": {"m": torch.ones(7)}}
    torch.save(trained, tmp_path / "whole.pt")
    torch_save_to_dcp(tmp_path / "whole.pt", folder)
    torch.save({"global_step": 3, "margin_state": {}, "trained_weights": ["a"]}, folder / "meta.pt")
    return folder


def test_shards_that_are_whole_are_read_with_what_lies_beside_them(shards: Path, tmp_path: Path) -> None:
    check_whole(tmp_path)
    expected = {"state_dict": {"a": torch.arange(300.0)}, "optimizer_0": {"m": torch.ones(7)}}
    assert_identical(read_trained(shards), expected | {"global_step": 3, "margin_state": {}})


def cut(file: Path) -> None:
    """Leave half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_checkpoint_of_which_a_part_is_missing_or_cut_short_is_found(
    damage: Callable[[Path], None], name: str, shards: Path, tmp_path: Path
) -> None:
    damage(shards / name)
    with pytest.raises(Broken):
        check_whole(tmp_path)


def test_shards_are_removed_under_another_name_first(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        StraightToFile().remove_checkpoint(shards)
    assert [file.name for file in shards.parent.iterdir()] == ["last.ckpt.removing"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("place", ["own", "before"])
def test_the_next_start_removes_what_was_being_removed_or_written_and_touches_nothing_else(
    place: str, tmp_path: Path
) -> None:
    def fit(folder: Path, *, steps: int, start: Path | None = None) -> None:
        trainer = Trainer(max_steps=steps, limit_train_batches=1, limit_val_batches=0, accelerator="cpu", logger=False)
        trainer.callbacks[:] = [RunCheckpoint(dirpath=str(folder), save_last=True)]
        trainer.fit(BoringModel(), ckpt_path=start, weights_only=True)

    fit(tmp_path / "before", steps=1)
    others = ["epoch=0-step=3.ckpt.partial", "mine.removing"]  # nobody has signed it; of another pattern
    for name in ["epoch=0-step=2.ckpt.removing", "epoch=0-step=5.ckpt.partial", *others]:
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name / "__0_0.distcp").touch()
    for name in ("epoch=0-step=4.ckpt.removing", ".epoch=0-step=5.ckpt.partial.writing"):
        (tmp_path / place / name).touch()
    if place == "before":  # that run may be alive on a machine whose locks do not show here: only what is old goes
        for path in (tmp_path / place).rglob("*5.ckpt.partial*"):
            os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
        os.utime(tmp_path / place / "epoch=0-step=5.ckpt.partial" / "__0_0.distcp", (time.time() - 2 * ABANDONED,) * 2)
        left_over(tmp_path / place / "epoch=0-step=6.ckpt.partial", seconds=ABANDONED / 2)
        others += ["epoch=0-step=6.ckpt.partial", ".epoch=0-step=6.ckpt.partial.writing"]
    fit(tmp_path / "own", steps=2, start=tmp_path / "before" / "last.ckpt")
    found = {file.name for file in (tmp_path / place).iterdir() if file.suffix != ".ckpt"}
    assert found == set(others) and all((tmp_path / place / name / "__0_0.distcp").is_file() for name in others[:2])


def group(*scripts: str) -> list[int]:
    """Start shell scripts as the processes of one group."""
    started: list[int] = []
    for script in scripts:
        leader = started[0] if started else 0
        started.append(os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ, setpgroup=leader))
    return started


def test_a_process_that_does_not_notice_the_end_of_another_is_ended() -> None:
    for number, noticed in ((signal.SIGKILL, False), (signal.SIGTERM, True)):
        processes = group("exec sleep 60", "exec sleep 60")
        attempt = Attempt(processes, grace=60 if noticed else 0.2)
        assert attempt.wait(0.05) is None
        stopped = attempt.stop(number) if noticed else attempt.stop_one(processes[1], number)
        assert stopped is noticed and attempt.running() == []
        assert attempt.wait(0) == -number


def test_an_attempt_has_failed_if_one_of_its_processes_has() -> None:
    assert Attempt(group("sleep 1", "exit 3"), grace=60).wait(60) == 3
    assert Attempt(group("exit 0", "sleep 0.1"), grace=60).wait(60) == 0


def test_a_held_port_is_given_to_nobody_and_torch_can_listen_on_it() -> None:
    with held_port() as held, socket.socket() as other:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for _ in range(60_000):  # about twice as many as there are
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("127.0.0.1", 0))
                assert one.getsockname()[1] != port
        store = TCPStore("127.0.0.1", port, 1, is_master=True)
        assert store.port == port

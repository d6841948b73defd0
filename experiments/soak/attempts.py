"""Attempts at a training, each a process group that may be killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Attempt:
    """A started `fit`.

    Args:
        alive: whether it still runs; a number once it has ended.
        group: of its processes.
    """

    def __init__(self, poll: Callable[[], int | None], group: int) -> None:
        self.poll, self.group = poll, group

    def wait(self, seconds: float) -> int | None:
        """Return its exit status, or None if it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return status

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes and wait for their end."""
        os.killpg(self.group, number)
        while self.poll() is None:
            time.sleep(0.005)


def start(options: list[str], log: Path, cache: Path, processes: int) -> Attempt:
    """Start `python -m gamma_po fit`.

    Args:
        options: of `fit`.
        log: takes what it says.
        cache: for tokens and reference log-probabilities.
        processes: 1, or more through torchrun.
    """
    environment = {"XDG_CACHE_HOME": str(cache)}
    return _forked(options, log, environment) if processes == 1 else _launched(options, log, environment, processes)


def _forked(options: list[str], log: Path, environment: dict[str, str]) -> Attempt:
    """Fork: the packages are loaded once, and a moment of an attempt is a moment of its work, not of its imports."""
    from gamma_po.cli import run

    child = os.fork()
    if child:
        return Attempt(_poll_child(child), child)
    status = 70
    try:
        os.setsid()
        os.environ.update(environment)
        sys.argv = ["gamma_po"]
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = run(["fit", *options])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def _poll_child(child: int) -> Callable[[], int | None]:
    ended: list[int] = []

    def poll() -> int | None:
        if not ended:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended.append(os.waitstatus_to_exitcode(status))
        return ended[0] if ended else None

    return poll


def _launched(options: list[str], log: Path, environment: dict[str, str], processes: int) -> Attempt:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "gamma_po", "fit", *options]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env={**os.environ, **environment}
        )
    return Attempt(process.poll, process.pid)

"""Attempts at a training, each a group of processes that may be killed at any moment."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

FAILED = 70  # the status of an attempt that ended in an exception


class Attempt:
    """A started `fit`.

    Args:
        processes: their ids; the first one's is that of their group.
        grace: seconds in which they must end once they were told to, or once one of them is gone.
    """

    def __init__(self, processes: Sequence[int], *, grace: float) -> None:
        self.processes, self.grace = processes, grace
        self.ended: dict[int, int] = {}  # id to status

    def running(self) -> list[int]:
        """Return the processes that have not ended."""
        for process in set(self.processes) - set(self.ended):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self.ended[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.processes if process not in self.ended]

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None if the attempt still runs after so many seconds.

        Once a process has failed, the others must end, too; those that do not are killed.
        """
        deadline = time.monotonic() + seconds
        while self.running() and not any(self.ended.values()) and time.monotonic() < deadline:
            time.sleep(0.005)
        if any(self.ended.values()):
            self._ends()
        return None if self.running() else max(self.ended.values(), key=abs)

    def stop(self, number: signal.Signals) -> bool:
        """Send a signal to all processes and wait for their end; return whether it came without further help."""
        os.killpg(self.processes[0], number)
        return self._ends()

    def stop_one(self, process: int, number: signal.Signals) -> bool:
        """Send a signal to one process and wait for the end of all; return whether it came without further help."""
        os.kill(process, number)
        return self._ends()

    def _ends(self) -> bool:
        deadline = time.monotonic() + self.grace
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.005)
        by_itself = not self.running()
        if not by_itself:
            os.killpg(self.processes[0], signal.SIGKILL)
        while self.running():
            time.sleep(0.005)
        return by_itself


def start(options: list[str], log: Path, cache: Path, *, processes: int, grace: float) -> Attempt:
    """Start `python -m gamma_po fit` in one process, or in several as a launcher does: each is told its rank.

    They are forked: the packages are loaded once, and a moment of an attempt is a moment of its work, not of its
    imports. (Those that torchrun starts would each be a group of its own.)

    Args:
        options: of `fit`.
        log: takes what it says.
        cache: for tokens and reference log-probabilities.
        processes: of the training.
        grace: see `Attempt`.
    """
    import gamma_po.cli  # noqa: F401 - loaded before forking

    environment = {"XDG_CACHE_HOME": str(cache)}
    started: list[int] = []
    with held_port() as port:
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        for rank in range(processes):
            own = {"NODE_RANK": "0", "LOCAL_RANK": str(rank)} if processes > 1 else {}
            child = os.fork()
            if not child:
                _fit(options, log, environment | own, rank)
            started.append(child)
            os.setpgid(child, started[0])
    return Attempt(started, grace=grace)


def _fit(options: list[str], log: Path, environment: dict[str, str], rank: int) -> NoReturn:
    """Run `fit` in a forked process, to its end."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from gamma_po.cli import run

    status = FAILED
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        os.environ.update(environment)
        rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
        sys.argv = ["gamma_po"]
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = run(["fit", *options])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: nobody would wait for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(FAILED)


def held_port() -> socket.socket:
    """Take a port on which torch can listen, and which nobody else gets while this or an inherited copy is open."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does; what only binds stands in no one's way
    one.bind(("127.0.0.1", 0))
    return one

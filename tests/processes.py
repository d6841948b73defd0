"""Run scripts in two processes that talk by gloo: as torchrun starts them, or at once, from a process that waits."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds; a busy machine is slow to start two of everything
GRACE = 20  # seconds for one process to end once the other has failed
FAILED = 70  # the status of a script that ended in an exception


def torchrun(script: list[str], **environment: str) -> str:
    """Run a script or module in two processes as a user starts them; return what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]
    return errors


def two_processes(script: list[str], **environment: str) -> str:
    """Run a script or module in two processes on the CPU; return what they said.

    They are forked from a process that has loaded the packages: to load them takes longer than most that is tested.
    """
    common = {**os.environ, **environment, "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    common |= {"NODE_RANK": "0", "WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        said = str(Path(folder) / "said")
        request = {"script": script, "environment": common, "said": said}
        launcher = _launcher()
        launcher.stdin.write(json.dumps(request) + "\n")
        launcher.stdin.flush()
        answer = launcher.stdout.readline()
        errors = Path(said).read_text() if Path(said).exists() else ""
    assert answer and json.loads(answer) == [0, 0], f"status {answer}: {errors[-4000:]}"
    return errors


@cache
def _launcher() -> subprocess.Popen[str]:
    """Start the process that waits; it ends with this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.processes"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(process.communicate)  # closes its input, at which it ends
    return process


# --- in the process that waits -----------------------------------------------------------------------------------


def serve() -> None:
    """Run what each line asks for; answer with the statuses."""
    import tests.runs  # noqa: F401 - and with it gamma_po.cli: loaded before forking
    from experiments.soak.attempts import held_port

    for line in sys.stdin:
        request = json.loads(line)
        with held_port() as port:
            request["environment"]["MASTER_PORT"] = str(port.getsockname()[1])
            answer = _statuses([_forked(request, rank) for rank in (0, 1)])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _statuses(processes: list[int]) -> list[int]:
    """Wait for all; end those that do not notice the end of another, and all that take too long."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(ended) < len(processes):
        for process in set(processes) - set(ended):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                ended[process] = os.waitstatus_to_exitcode(status)
                if ended[process]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[process] for process in processes]


def _forked(request: dict[str, Any], rank: int) -> int:
    """Fork one process of the two; return its id."""
    child = os.fork()
    return child or _run(request["script"], request["environment"], request["said"], rank)


def _run(script: list[str], environment: dict[str, str], said: str, rank: int) -> NoReturn:
    """Run the script in a forked process, to its end."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    status = FAILED
    try:
        with open(said, "ab") as file, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
        if script[0] == "-m":
            sys.argv = script[1:]
            runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(script)
            runpy.run_path(script[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()

"""A process per arm that takes one step when it is told to, so that arms can take turns."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from duel.plan import Arm, Setting

STEP_LIMIT = 3600.0  # seconds
SIDES = {"ours": "duel.ours", "trl": "duel.theirs"}


class Facts(NamedTuple):
    """What a side says of the step it took."""

    rows: tuple[int, ...]
    loss: float
    completion_tokens: int
    model_tokens: int  # tokens that went through the model, padding included


class Step(NamedTuple):
    """A step: what was done, and what it cost."""

    facts: Facts
    cost: float  # seconds; see meter.Spent
    wall: float  # seconds


class Gate:
    """Where a training loop waits after each step, on the process's side."""

    def __init__(self, connection: Connection, device: str) -> None:
        from duel.meter import Meter

        self.connection, self.meter = connection, Meter(device)
        self.counting = False
        self.meter.start()

    def after_step(self, facts: Callable[[], Facts], questions: dict[str, Callable[[], Any]]) -> None:
        """Report the step that has just ended; answer questions; return when the next step shall begin.

        Args:
            facts: of the step.
            questions: what this side can answer besides.
        """
        spent = self.meter.stop()
        answer: Any = self.meter.counted_flops() if self.counting else Step(facts(), *spent)
        self.counting = False
        questions = {"reset_peak": self.meter.reset_peak, "peak": self.meter.peak, **questions}
        while True:
            self.connection.send(answer)
            command = self.connection.recv()
            if command in ("step", "count"):
                break
            answer = questions[command]()
        self.counting = command == "count"
        if self.counting:
            self.meter.count_flops()
        self.meter.start()


class Failure(NamedTuple):
    """What a process sends instead of an answer when it fails."""

    message: str


class Racer:
    """An arm in a process of its own; made, it has taken its first step."""

    def __init__(self, name: str, arm: Arm, setting: Setting) -> None:
        self.name, self.arm, self.setting = name, arm, setting
        self.log = setting.logs / f"{setting.mode}-{name}.log"
        self.process, self.connection = start(_race, (arm, setting), self.log)
        self.first: Step = self._answer()

    def ask(self, command: str) -> Any:
        """Send `step`, `count` (a step whose FLOPs are counted) or a question, and wait for the answer."""
        self.connection.send(command)
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        end(self.process)

    def _answer(self) -> Any:
        return receive(self.process, self.connection, f"{self.setting.mode}, {self.name}", self.log)


def start(target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> tuple[Any, Connection]:
    """Run `target(connection, *arguments)` in a fresh process whose output goes to a file."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(target, there, arguments, log), daemon=True)
    process.start()
    there.close()
    return process, here


def receive(process: Any, connection: Connection, name: str, log: Path) -> Any:
    """Wait for what a process sends.

    Raises:
        RuntimeError: it failed, died, or took longer than an hour.
    """
    try:
        answer = connection.recv() if connection.poll(STEP_LIMIT) else Failure(f"no answer in {STEP_LIMIT:.0f} s")
    except EOFError:
        process.join()
        answer = Failure(f"the process ended with status {process.exitcode} (-9: killed, perhaps for want of memory)")
    if isinstance(answer, Failure):
        end(process)
        raise RuntimeError(f"{name}: {answer.message}\n(its output: {log})")
    return answer


def end(process: Any) -> None:
    """End a process that has no more to say."""
    process.kill()
    process.join()


def _run(target: Callable[..., None], connection: Connection, arguments: tuple[Any, ...], log: Path) -> None:
    """In the process: send output to the log, and failures to the parent."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        target(connection, *arguments)
    except BaseException as error:  # also SystemExit, as which our command line reports wrong options
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(Failure(f"{type(error).__name__}: {error}"))
        raise


def _race(connection: Connection, arm: Arm, setting: Setting) -> None:
    prepare(setting)
    importlib.import_module(SIDES[arm.side]).train(setting, arm, Gate(connection, setting.device))


def prepare(setting: Setting) -> None:
    """Give this process its threads; keep its progress bars from a semaphore, which would outlive it."""
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(setting.threads)


class Record(NamedTuple):
    """What a racer did."""

    steps: list[Step]
    flops: int  # counted in one step
    peak: float  # memory over the steps, MiB


def take_turns(racers: list[Racer], *, steps: int, tell: Callable[[str], None]) -> dict[str, Record]:
    """Let all arms take each step in turn; another one begins each round.

    Args:
        racers: after their first step. In the second step FLOPs are counted, the following ones are measured.
        steps: to measure, >= 1.
        tell: is told how far it is.
    """
    flops = {racer.name: racer.ask("count") for racer in racers}
    for racer in racers:
        racer.ask("reset_peak")
    taken: dict[str, list[Step]] = {racer.name: [] for racer in racers}
    for number in range(steps):
        tell(f"step {number + 1} of {steps}")
        first = number % len(racers)
        for racer in racers[first:] + racers[:first]:
            taken[racer.name].append(racer.ask("step"))
    return {racer.name: Record(taken[racer.name], flops[racer.name], racer.ask("peak")) for racer in racers}


def median_seconds(action: Callable[[], Any], *, repeats: int) -> float:
    """Median process time of a short action, after as many repeats that do not count."""
    times = []
    for _ in range(2 * repeats):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return statistics.median(times[repeats:])

"""Kill a training at random moments, start it again, and compare it with one that was left alone.

    python -m experiments.soak --work FOLDER --kills 50 -- <options of fit>
    python -m experiments.soak --work FOLDER --minutes 30 --signal SIGTERM -- <options of fit>

The soak of the project, SmolLM2 on a CPU (about 30 minutes of training, kills included):

    python -m experiments.soak --work runs/soak --minutes 30 --mean 60 -- --config experiments/quickstart.yaml \
        --trainer.max_epochs -1 --trainer.max_steps 120 --checkpoint.every_n_train_steps 5 --checkpoint.monitor null

Two processes that share the weights (FSDP2, checkpoints in shards), of which all are killed at once, or one, so that
the other has to notice:

    python -m experiments.soak --work runs/soak --kills 25 --processes 2 --victims either -- \
        --config experiments/quickstart.yaml --trainer.accelerator cpu --trainer.devices 2 --data.batch_size 2 \
        --trainer.strategy ModelParallelStrategy --trainer.strategy.data_parallel_size 2 \
        --trainer.strategy.tensor_parallel_size 1 --weights_only false --checkpoint.every_n_train_steps 1

(One that is killed before they have met is not noticed: torch lets the others wait for half an hour. `--grace` ends
them, as launchers do.)

Every attempt is the same command with `--ckpt_path last`. After each kill all checkpoints and caches must be whole. At
the end weights, optimizer, margin history, and every pair, loss and γ of every step of every attempt must be those of
the uninterrupted training, bit for bit. Exit status 0 if so, 1 with the first difference otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from experiments.soak.attempts import Attempt, start
from experiments.soak.comparison import Broken, check_whole, furthest_step, runs_of, same_ending, same_steps

FOREVER = 24 * 3600.0


class Soak:
    """One soak: an uninterrupted training, and series of interrupted ones.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.signal = signal.Signals[options.signal]
        self.kills = self.of_one = self.not_noticed = self.restarts_checked = self.half_written = 0
        self.at_steps: list[int] = []
        self.began = 0.0
        self.longest = 0.0

    def run(self) -> dict[str, object]:
        """Return the figures.

        Raises:
            Broken: something differs, or is neither whole nor absent.
        """
        work: Path = self.options.work
        began = time.monotonic()
        whole = self._whole(work / "whole")
        self.longest = time.monotonic() - began
        self.began = time.monotonic()
        series = 0
        while self._goes_on() or not series:
            series += 1
            folder = work / f"series-{series}"
            self._series(folder, whole)
            shutil.rmtree(folder)  # equal to the whole one
        return {
            "kills": self.kills,
            "signal": self.signal.name,
            "kills_of_one_of_several_processes": self.of_one,
            "of_these_not_noticed_by_the_others": self.not_noticed,
            "trainings": series,
            "checkpoints_half_written_at_a_kill": self.half_written,
            "restarts_at_the_last_checkpoint": self.restarts_checked,
            "kills_before_the_first_checkpoint": sum(step == 0 for step in self.at_steps),
            "steps_at_kills": self.at_steps,
            "seconds_uninterrupted": round(self.longest, 1),
            "seconds_interrupted": round(time.monotonic() - self.began, 1),
        }

    def _goes_on(self) -> bool:
        if self.options.kills is not None:
            return self.kills < self.options.kills
        return time.monotonic() - self.began < 60 * self.options.minutes

    def _start(self, folder: Path) -> Attempt:
        given = [*self.options.fit, "--run.root", str(folder / "runs"), "--run.name", "run", "--ckpt_path", "last"]
        given += ["--pair_recorder.every_n_steps", "1"]
        folder.mkdir(parents=True, exist_ok=True)
        of_run = {"processes": self.options.processes, "grace": self.options.grace}
        return start(given, folder / "said.txt", folder / "cache", **of_run)

    def _whole(self, folder: Path) -> Path:
        status = self._start(folder).wait(FOREVER)
        if status != 0:
            raise Broken(f"the uninterrupted training failed: see {folder / 'said.txt'}")
        return runs_of(folder)[0]

    def _series(self, folder: Path, whole: Path) -> None:
        """Start and kill until an attempt ends by itself; compare."""
        checked = 0
        while True:
            before = furthest_step(folder)
            known = set(runs_of(folder))
            attempt = self._start(folder)
            if self.options.after_first_checkpoint:
                self._wait_for_checkpoint(folder, attempt)
            status = attempt.wait(self._moment() if self._goes_on() else FOREVER)
            if status is None:
                self._strike(attempt)
                self.kills += 1
                self.at_steps.append(furthest_step(folder))
            self._remove_half_written(folder)
            check_whole(folder)
            if furthest_step(folder) < before:
                raise Broken(f"{folder}: the furthest checkpoint was at step {before}, then at {furthest_step(folder)}")
            for run in set(runs_of(folder)) - known:
                steps = same_steps(run, whole, first=before + 1)
                checked += steps if before else 0
            if status == 0:
                break
            if status is not None:
                raise Broken(f"an attempt failed with status {status}: see {folder / 'said.txt'}")
        same_ending(runs_of(folder)[-1], whole)
        self.restarts_checked += checked

    def _wait_for_checkpoint(self, folder: Path, attempt: Attempt) -> None:
        """Wait until a checkpoint is there, or the attempt has ended."""
        while not furthest_step(folder) and attempt.wait(0.05) is None:
            pass

    def _strike(self, attempt: Attempt) -> None:
        """Send the signal to all processes or to one, as the options say."""
        running, victims = attempt.running(), self.options.victims
        if victims == "either":
            victims = self.random.choice(["all", "one"])
        if victims == "one" and len(running) > 1:
            self.of_one += 1
            self.not_noticed += not attempt.stop_one(self.random.choice(running), self.signal)
        elif running and not attempt.stop(self.signal):
            raise Broken(f"the attempt did not stop at {self.signal.name}")

    def _remove_half_written(self, folder: Path) -> None:
        for left in folder.glob("runs/run/*/checkpoints/*.partial"):
            self.half_written += 1
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _moment(self) -> float:
        mean = self.options.mean
        return self.random.uniform(0, self.longest) if mean is None else self.random.expovariate(1 / mean)


def main(arguments: list[str]) -> int:
    """Soak; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, caches and logs; made anew")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--kills", type=int)
    until.add_argument("--minutes", type=float)
    parser.add_argument("--mean", type=float, help="mean seconds to a kill; by default any moment of a whole training")
    parser.add_argument("--after-first-checkpoint", action="store_true", help="kill only from then on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM"], default="SIGKILL")
    parser.add_argument("--processes", type=int, default=1, help="that the options of fit ask for")
    parser.add_argument("--victims", choices=["all", "one", "either"], default="all", help="processes that are killed")
    parser.add_argument("--grace", type=float, default=300, help="seconds for the others to end once one is gone")
    parser.add_argument("fit", nargs="*", help="options of fit, after --")
    options = parser.parse_args(arguments)
    if options.work.exists():
        parser.error(f"--work {options.work} exists already")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        figures = Soak(options).run()
    except Broken as error:
        sys.stderr.write(f"broken: {error}\n")
        return 1
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

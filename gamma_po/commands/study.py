"""Studies: does a target margin help? Every run exact, with controls, intervals and a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console

from gamma_po.commands.arguments import guarded, parse
from gamma_po.commands.study_calibrate import CalibrateOptions, run_calibration
from gamma_po.commands.study_lm import LanguageOptions, run_language_study
from gamma_po.commands.study_tune import TuneOptions, run_tuned_study
from gamma_po.errors import require
from gamma_po.studies.alpacaeval import AlpacaEval
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.presets import ELSEWHERE, PRESETS
from gamma_po.studies.report import new_folder, print_study, write_study
from gamma_po.studies.running import Testbed, available_workers

USAGE = (
    "usage: python -m gamma_po study bandit|alpacaeval|lm|tune|calibrate [options]; "
    "--help after any of them lists them\n"
)


@dataclass(frozen=True, kw_only=True)
class BanditOptions:
    """What to run.

    Args:
        output: new or empty folder for tables, figures and every run.
        preset: the study; `--preset list` prints them.
        seeds: how many seeds to compare on; by default the preset's.
        flips: shares of labels flipped, each in [0, 0.5); by default the preset's.
        rhos: informativeness of the references, each in [0, 1]; by default the preset's.
        workers: processes; by default one per processor.
    """

    output: str
    preset: str = "p1"
    seeds: int | None = None
    flips: list[float] | None = None
    rhos: list[float] | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class AlpacaEvalOptions(BanditOptions):
    """What to run.

    Args:
        output: new or empty folder for tables, figures and every run.
        data: pairs as a Parquet file or a folder of them (columns prompt, chosen, rejected, score_chosen,
            score_rejected), or the `results` folder of a checkout of AlpacaEval.
        preset: the study; `--preset list` prints them.
        seeds: how many seeds to compare on; by default the preset's.
        flips: shares of labels flipped, each in [0, 0.5); by default the preset's.
        rhos: informativeness of the references, each in [0, 1]; by default the preset's.
        workers: processes; by default one per processor.
    """

    data: str


def main(arguments: list[str]) -> int:
    """Run `study bandit`, `alpacaeval`, `lm`, `tune` or `calibrate`; 1 if a check of the study failed."""
    if not arguments or arguments[0] not in ("bandit", "alpacaeval", "lm", "tune", "calibrate"):
        (sys.stdout if arguments[:1] in (["--help"], ["-h"]) else sys.stderr).write(USAGE)
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    testbed, rest = arguments[0], arguments[1:]
    if testbed == "calibrate":
        calibration = parse(CalibrateOptions, rest, "study calibrate")
        return guarded(lambda: run_calibration(calibration))
    if testbed == "lm":
        return guarded(lambda: run_language_study(parse(LanguageOptions, rest, "study lm"), arguments))
    if testbed == "tune":
        return guarded(lambda: run_tuned_study(parse(TuneOptions, rest, "study tune"), arguments))
    if "--preset=list" in rest or ("--preset", "list") in itertools.pairwise(rest):
        listed = {name: text for name, (text, _) in PRESETS.items()} | ELSEWHERE
        sys.stdout.write("".join(f"{name:10} {text}\n" for name, text in listed.items()))
        return 0
    if testbed == "bandit":
        options = parse(BanditOptions, rest, "study bandit")
        return guarded(lambda: run(Bandit(), options, arguments))
    options = parse(AlpacaEvalOptions, rest, "study alpacaeval")
    return guarded(lambda: run(AlpacaEval.read(options.data), options, arguments))


def run(testbed: Testbed, options: BanditOptions, arguments: list[str]) -> int:
    """Run a preset, print and write its results."""
    require(options.preset in PRESETS, "preset", options.preset, ", ".join(PRESETS))
    require(options.seeds is None or options.seeds >= 2, "seeds", options.seeds, "an integer >= 2")
    require(options.workers is None or options.workers >= 1, "workers", options.workers, "an integer >= 1")
    folder, start = new_folder(options.output), time.monotonic()
    _, build = PRESETS[options.preset]
    given = {"flips": options.flips, "rhos": options.rhos, "seeds": options.seeds and range(options.seeds)}
    protocol = dataclasses.replace(build(testbed), **{name: tuple(value) for name, value in given.items() if value})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster than several for tensors of this size
    try:
        study = dataclasses.replace(protocol.run(workers=options.workers or available_workers()), scope=testbed.scope)
    finally:
        torch.set_num_threads(threads)
    print_study(study, Console())
    write_study(study, folder, ["python", "-m", "gamma_po", "study", *arguments], time.monotonic() - start)
    sys.stdout.write(f"written to {folder}\n")
    return 0 if study.passed else 1

"""How strongly to trust the reference's margin: short runs of a map at several strengths, judged by held-out pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from gamma_po.commands.study_lm import carry_out, check_workers
from gamma_po.errors import ConfigError
from gamma_po.files import write_text
from gamma_po.studies.calibration import STRENGTHS, check_strengths, choose
from gamma_po.studies.lm_folder import check_same_study
from gamma_po.studies.lm_outcome import implicit_margins, test_prompts, test_scores, training_prompts
from gamma_po.studies.lm_plan import LanguageArm, LanguageStudy, option, plan
from gamma_po.studies.lm_study import read_result
from gamma_po.studies.measures import log_likelihoods

OPTION = "model.margin.init_args.strength"


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to run.

    Args:
        fit: YAML file of an ordinary run whose margin is Map.
        pairs: held-out pairs with labels: a few hundred clean ones, or about ten times as many noisy ones.
        output: folder of the runs and of calibration.json. Given again, it continues.
        strengths: of the map, 0 among them, each once. Other than 0 is chosen only if it makes the labels likelier by
            more than two standard errors.
        set: options of `fit` to change, by their dotted names, e.g. fewer steps: {trainer.max_steps: 100}.
        device: cpu, a process per worker with one thread; or gpu, a process per GPU.
        workers: processes; by default one per processor or GPU.
    """

    fit: str
    pairs: str
    output: str
    strengths: list[float] = field(default_factory=lambda: list(STRENGTHS))
    set: dict[str, Any] = field(default_factory=dict)
    device: Literal["cpu", "gpu"] = "cpu"
    workers: int | None = None


def run_calibration(options: CalibrateOptions) -> int:
    """Train every strength, print how likely each makes the held-out labels, and which to use.

    Returns:
        0; 1 if a run failed; 130 if interrupted.
    """
    check_workers(options.workers)
    check_strengths(options.strengths)
    study, folder = calibration_study(options), Path(options.output).expanduser().resolve()
    units = plan(study, folder, options.device)
    margin = option(units[0][0].config, "model.margin.class_path")
    if margin is None or margin.rpartition(".")[2] != "Map":
        raise ConfigError(f"fit={options.fit!r} has the margin {margin}; allowed: Map, whose strength is calibrated")
    check_same_study(study, units, folder, options.device)
    if status := carry_out(study, units, folder, options.device, options.workers, None):
        return status
    gaps, held_out = [], []
    for (run,) in units:
        row = read_result(folder, run)
        assert row is not None, "every run has a result by now"
        gaps.append(implicit_margins(test_scores(folder / row["folder"])))
        held_out = test_prompts(folder / row["folder"], run.config)
    if shared := set(held_out) & training_prompts(units[0][0].config):
        sys.stderr.write(
            f"warning: {len(shared)} of the {len(set(held_out))} held-out prompts are training prompts, too; what was "
            "learnt by heart counts for a strength there\n"
        )
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(held_out))}
    prompts = torch.tensor([numbers[prompt] for prompt in held_out])
    return _report(options.strengths, torch.stack(gaps), prompts, folder)


def calibration_study(options: CalibrateOptions) -> LanguageStudy:
    """Return the runs as a study: an arm per strength."""
    without_samples = {"report": {"num_prompts": 0}}
    common = options.set | {"data.test": options.pairs, "data.limit_test": None} | without_samples
    arms = {f"strength {k:g}": LanguageArm(set={OPTION: k}) for k in options.strengths}
    return LanguageStudy(fit=options.fit, arms=arms, noise=[0.0], seeds=1, set=common, gold_columns=[])


def _report(strengths: Sequence[float], gaps: torch.Tensor, prompts: torch.Tensor, folder: Path) -> int:
    choice = choose(strengths, log_likelihoods(gaps), prompts)
    title = f"labels of {gaps.shape[1]} held-out pairs of {len(prompts.unique())} prompts"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("strength", "accuracy", "log-likelihood per pair, minus that at 0", "standard error"):
        table.add_column(name)
    right = ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean(1).tolist()
    for strength, accuracy, gain, error in zip(strengths, right, choice.gain, choice.error, strict=True):
        table.add_row(f"{strength:g}", f"{accuracy:.3f}", f"{gain:+.5f}", f"{error:.5f}")
    Console().print(table)
    found = {"strength": choice.strength, "strengths": list(strengths), "gain": choice.gain, "error": choice.error}
    write_text(folder / "calibration.json", json.dumps(found | {"accuracy": right}, indent=2) + "\n")
    text = yaml.safe_dump({"model": {"margin": {"init_args": {"strength": choice.strength}}}}, default_flow_style=True)
    sys.stdout.write(f"use --{OPTION} {choice.strength:g}, in YAML {text.strip()}\n")
    return 0

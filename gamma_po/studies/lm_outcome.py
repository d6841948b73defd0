"""Testbed S3: what a finished run on a language model is worth, as one row.

Two measures of the same policy. *Its own samples*: gold reward, win rate against the reference's samples, KL per
sequence, length. *The reference's answers*, reweighted: the test set holds several answers of the reference to each
prompt, with gold rewards; among them the policy is π ∝ π_ref exp(α f), f = log π - log π_ref, so that win rates are
exact sums without sampling noise, and can be compared at equal KL by the choice of α, as in the bandit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from gamma_po.commit import source_commit
from gamma_po.data.noise import flip_mask
from gamma_po.data.sources import read_rows
from gamma_po.errors import DataError
from gamma_po.files import write_text
from gamma_po.studies.lm_plan import PlannedRun, option
from gamma_po.studies.measures import Judge
from gamma_po.studies.running import Row, Trace, measured
from gamma_po.studies.worlds import HeldOut

SAMPLED = {
    "sample_win_rate": "win_rate", "sample_gold": "gold_policy", "sample_gold_reference": "gold_reference",
    "sample_kl": "kl",
}  # fmt: skip


class Candidates(NamedTuple):
    """The reference's answers to M prompts, K at most, with a policy's scores."""

    held_out: HeldOut  # [M, K] each; features are empty
    scores: Tensor  # [M, K] log π - log π_ref, nats


def training_rows(config: dict[str, Any], flip_rate: float, seed: int, file: Path) -> None:
    """Write the training pairs whose labels are not flipped at this rate and seed; pair i is row i of the file."""
    source, limit = option(config, "data.train"), option(config, "data.limit_train")
    rows = read_rows(source)[:limit]
    flipped = flip_mask(len(rows), flip_rate, seed).tolist()
    kept = [row.values for row, out in zip(rows, flipped, strict=True) if not out]
    write_text(file, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in kept))


def outcome(run: PlannedRun, folder: Path, gold_columns: Sequence[str], kls: Sequence[float]) -> Row:
    """Return the row of a finished run.

    Args:
        run: what was planned.
        folder: the run's directory.
        gold_columns: of the test set; none leaves out what needs gold rewards.
        kls: at which the policy is also measured.

    Raises:
        DataError: the run took fewer steps than planned, or a file is missing.
    """
    report, trace = json.loads((folder / "report.json").read_text()), read_trace(folder)
    steps, planned = len(list((folder / "pairs").glob("*.parquet"))), option(run.config, "trainer.max_steps")
    if steps != planned:
        raise DataError(f"{folder}: {steps} steps were recorded, {planned} planned")
    pairs, samples = report["pairs"], report["samples"] or {}
    row = what_was_run(run) | {"steps": steps, "folder": str(folder), "commit": source_commit()}
    row |= {"ref_acc": pairs["accuracy_reference"]["mean"], "pair_accuracy": pairs["reward_accuracy"]["mean"]}
    row |= {"test_pairs": pairs["num_pairs"], "sample_prompts": len(report["texts"])}
    row |= {name: (samples.get(key) or {}).get("mean", math.nan) for name, key in SAMPLED.items()}
    row |= {f"sample_{name}": samples.get(name, math.nan) for name in ("length_policy", "length_reference")}
    if gold_columns:
        row |= judged(candidates(folder, run.config, gold_columns), kls)
    return row | _training_columns(folder, trace)


def what_was_run(run: PlannedRun) -> Row:
    """Return a run's settings as columns."""
    loss, margin = (option(run.config, f"model.{name}") for name in ("loss", "margin"))
    beta, rate = option(loss, "init_args.beta"), option(run.config, "model.optimizer.init_args.lr")
    return {
        "arm": run.arm, "seed": run.seed, "rho": None, "flip_rate": run.flip_rate,
        "loss": json.dumps(loss), "margin": json.dumps(margin), "mask": "flipped" if run.without_flipped else "none",
        "beta": beta, "learning_rate": rate, "gamma0_over_tau": _strength(margin, beta),
    }  # fmt: skip


def _strength(margin: Mapping[str, Any], beta: float | None) -> float | None:
    """γ0/τ of a KL margin, also of one that another margin reverses or shuffles, None where it is not stated."""
    inner = option(margin, "init_args.inner") or margin
    gamma0, tau = (option(inner, f"init_args.{name}") for name in ("gamma0", "tau"))
    if isinstance(gamma0, Mapping) and beta is not None:
        gamma0 = beta * (option(gamma0, "gamma_beta_ratio") or option(gamma0, "init_args.gamma_beta_ratio"))
    return None if gamma0 is None or tau is None else gamma0 / tau


def _training_columns(folder: Path, trace: Trace) -> Row:
    table = _pairs(folder)
    gamma, total = table["target_margin"], trace.weight.sum().clamp_min(1e-30)
    share = float((trace.weight * trace.flipped).sum() / total)
    spread = [float(part.max() - part.min()) for part in _by_step(gamma, table["step"])]
    flipped = float(trace.flipped.double().mean())
    return {
        "gradient_on_flipped": share, "gradient_on_wrong": share, "gradient_weight": float(trace.weight.mean()),
        "gamma_mean": float(gamma.mean()), "gamma_sd": float(gamma.std(correction=0)),
        "gamma_range": sum(spread) / len(spread), "flipped": flipped, "wrong": flipped,
    }  # fmt: skip


def _by_step(values: Tensor, step: Tensor) -> list[Tensor]:
    return [values[step == number] for number in step.unique()]


def _pairs(folder: Path) -> dict[str, Tensor]:
    names = ("step", "reward_margin", "target_margin", "gradient_weight", "flipped")
    tables = [pq.read_table(file, columns=list(names)) for file in sorted((folder / "pairs").glob("*.parquet"))]
    if not tables:
        raise DataError(f"{folder}: no recorded pairs; a run of a study has pair_recorder.every_n_steps: 1")
    return {name: torch.cat([torch.tensor(table[name].to_pylist()) for table in tables]) for name in names}


def read_trace(folder: Path) -> Trace:
    """Return reward margins, gradient weights and flips of all training pairs of a run."""
    table = _pairs(folder)
    return Trace(table["reward_margin"], table["gradient_weight"], table["flipped"])


def test_scores(folder: Path) -> dict[str, Tensor]:
    """Return the log-probabilities of the test pairs under policy and reference, [N] each."""
    file = folder / "test_pairs.parquet"
    if not file.is_file():
        raise DataError(f"{file}: is missing; the run's report writes it: report.enabled must be true")
    table = pq.read_table(file)
    return {name: torch.tensor(table[name].to_numpy()) for name in table.column_names}


def implicit_margins(scores: dict[str, Tensor]) -> Tensor:
    """Return log π/π_ref of the chosen completion minus that of the rejected one, [N], nats, of `test_scores`."""
    policy = scores["logps_chosen"] - scores["logps_rejected"]
    return policy - (scores["reference_logps_chosen"] - scores["reference_logps_rejected"])


def test_prompts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return what identifies the prompt of each test pair, [N], in the order of `test_scores`."""
    name = option(config, "data.columns.prompt") or "prompt"
    rows = read_rows(option(config, "data.test"))
    return [prompt_of(rows[number].values, name) for number in test_scores(folder)["index"].tolist()]


def training_prompts(config: Mapping[str, Any]) -> set[str]:
    """Return what identifies the prompts of the training pairs, as in `test_prompts`, over all sources."""
    given, name = option(config, "data.train"), option(config, "data.columns.prompt") or "prompt"
    found = set()
    for source in given if isinstance(given, list) else [{"path": given}]:
        own = option(source, "columns.prompt") or name
        limit = source.get("limit") or option(config, "data.limit_train")
        found |= {prompt_of(row.values, own) for row in read_rows(source["path"])[:limit]}
    return found


def prompt_of(values: Mapping[str, Any], name: str) -> str:
    """Return the prompt of a row, or the whole row where it has no such column: a prompt of its own."""
    return repr(values[name]) if name in values else repr(sorted(values.items()))


def candidates(folder: Path, config: dict[str, Any], gold_columns: Sequence[str]) -> Candidates:
    """Collect the answers of the test pairs by prompt, each once.

    Raises:
        DataError: the test set has no such columns.
    """
    source = option(config, "data.test")
    rows, scores = read_rows(source), test_scores(folder)
    names = option(config, "data.columns") or {}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for place, number in enumerate(scores["index"].tolist()):
        row = rows[number]
        for side, gold in zip(("chosen", "rejected"), gold_columns, strict=True):
            if gold not in row.values:
                raise DataError(f"{row.location}: no column {gold!r}; its columns: {', '.join(row.values)}")
            answer = repr(row.values[names.get(side) or side])
            log_ratio = float(scores[f"logps_{side}"][place] - scores[f"reference_logps_{side}"][place])
            answers = found.setdefault(repr(row.values[names.get("prompt") or "prompt"]), {})
            answers[answer] = (float(row.values[gold]), log_ratio)
    return _padded([list(answers.values()) for answers in found.values()])


def _padded(prompts: Sequence[Sequence[tuple[float, float]]]) -> Candidates:
    most = max(map(len, prompts))
    gold, scores = torch.zeros(len(prompts), most), torch.zeros(len(prompts), most)
    reference = torch.full_like(gold, -torch.inf)
    for number, answers in enumerate(prompts):
        own = torch.tensor(answers)
        gold[number, : len(answers)], scores[number, : len(answers)] = own[:, 0], own[:, 1]
        reference[number, : len(answers)] = -math.log(len(answers))
    return Candidates(HeldOut(torch.empty(len(prompts), most, 0), reference, gold), scores)


def judged(found: Candidates, kls: Sequence[float]) -> Row:
    """Measure a policy among the reference's answers, as trained and rescaled to KLs.

    Raises:
        ArithmeticError: the reference does not win exactly half against itself.
    """
    columns = measured(Judge(found.held_out), found.scores[None], kls)
    return {name: float(value) for name, value in columns.items() if name != "pair_accuracy"}

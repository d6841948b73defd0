"""Accuracy of implicit rewards on preference pairs, by subset, as RewardBench reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gamma_po.evaluation.intervals import Estimate, clustered_share
from gamma_po.evaluation.pairs import preferred
from gamma_po.types import Evidence

REWARDS = {
    "log_ratio": "log π/π_ref (DPO)",
    "mean_log_ratio": "per token: log π/π_ref",
    "logp": "log π",
    "mean_logp": "per token: log π (SimPO)",
}
# RewardBench (arXiv 2403.13787), appendix: subsets of its sections, and the weight of one subset that is not its size.
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
CODE, MATHEMATICS = "hep-", "math-prm"  # mathematics weighs as much as all of code


class SubsetAccuracy(NamedTuple):
    """Accuracies over the pairs of one subset, or means over subsets, by reward."""

    name: str
    num_pairs: int
    accuracy: dict[str, Estimate | float]  # an interval where pairs were counted


def reward_margins(evidence: Evidence) -> dict[str, Tensor]:
    """Return h per pair under each implicit reward, [N] each; β does not change its sign and is left out.

    Args:
        evidence: of N pairs; without a reference only the rewards that need none.
    """
    policy, reference = evidence.policy, evidence.reference
    margins = {}
    if reference is not None:
        margins["log_ratio"] = policy.margin - reference.margin
        chosen = (policy.chosen - reference.chosen) / policy.chosen_length
        margins["mean_log_ratio"] = chosen - (policy.rejected - reference.rejected) / policy.rejected_length
    margins["logp"] = policy.margin
    margins["mean_logp"] = policy.mean_chosen - policy.mean_rejected
    return margins


def subset_accuracies(
    margins: dict[str, Tensor], subsets: Sequence[str], prompts: Sequence[object]
) -> list[SubsetAccuracy]:
    """Return the accuracy of each subset, RewardBench's sections where these are its subsets, and the means.

    Args:
        margins: [N] each, of `reward_margins`.
        subsets: names, N.
        prompts: N; equal ones form a cluster.
    """
    numbers: dict[str, int] = {}
    clusters = torch.tensor([numbers.setdefault(repr(prompt), len(numbers)) for prompt in prompts])
    rows = [_accuracy(name, margins, clusters, [s == name for s in subsets]) for name in dict.fromkeys(subsets)]
    result = list(rows)
    if len(rows) > 1:
        result.append(_mean("mean over subsets", rows))
        sections = section_accuracies(rows)
        if sections:
            result += [*sections, _mean("mean over sections", sections)]
        result.append(_accuracy("all pairs", margins, clusters, [True] * len(subsets)))
    return result


def section_accuracies(rows: Sequence[SubsetAccuracy]) -> list[SubsetAccuracy]:
    """Return RewardBench's section scores, weighted by size, if all subsets are RewardBench's; otherwise none."""
    by_name = {row.name: row for row in rows}
    if not set(by_name) <= {name for names in SECTIONS.values() for name in names}:
        return []
    sections = []
    for section, names in SECTIONS.items():
        present = [by_name[name] for name in names if name in by_name]
        code = sum(row.num_pairs for row in present if row.name.startswith(CODE))
        weights = [code if row.name == MATHEMATICS and code else row.num_pairs for row in present]
        if present:
            sections.append(_mean(section, present, weights))
    return sections


def accuracy_table(rows: Sequence[SubsetAccuracy]) -> Table:
    """Return the table: a row per subset, a column per reward."""
    title = "pair accuracy of implicit rewards (below: 95 % intervals; ties 1/2)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("subset", overflow="fold")
    table.add_column("pairs", justify="right")
    for name in rows[0].accuracy:
        table.add_column(REWARDS[name].replace(": ", ":\n").replace(" (", "\n("))
    for row in rows:
        table.add_row(Text(row.name), str(row.num_pairs), *map(_cell, row.accuracy.values()))
    return table


def _cell(value: Estimate | float) -> str:
    """A share, and its interval on a line of its own: RewardBench's table is 80 characters wide."""
    return f"{value:.3f}" if isinstance(value, float) else f"{value.mean:.3f}\n{value.low:.3f}-{value.high:.3f}"


def _accuracy(name: str, margins: dict[str, Tensor], clusters: Tensor, chosen: list[bool]) -> SubsetAccuracy:
    where = torch.tensor(chosen)
    shares = {key: clustered_share(preferred(value[where]), clusters[where]) for key, value in margins.items()}
    return SubsetAccuracy(name, int(where.sum()), shares)


def _mean(name: str, rows: Sequence[SubsetAccuracy], weights: Sequence[int] | None = None) -> SubsetAccuracy:
    weights = weights or [1] * len(rows)
    means = {
        key: sum(w * _value(row.accuracy[key]) for w, row in zip(weights, rows, strict=True)) / sum(weights)
        for key in rows[0].accuracy
    }
    return SubsetAccuracy(name, sum(row.num_pairs for row in rows), means)


def _value(estimate: Estimate | float) -> float:
    return estimate if isinstance(estimate, float) else estimate.mean

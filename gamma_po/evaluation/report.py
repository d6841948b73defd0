"""The table at the end: reference against policy, with intervals; and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gamma_po.evaluation.intervals import Estimate, clustered_mean, clustered_share
from gamma_po.evaluation.on_policy import Comparison
from gamma_po.evaluation.pairs import preferred

LAST_VALUES = {
    "loss": "loss",
    "rewards/accuracies": "implicit-reward accuracy",
    "rewards/margins": "reward margin",
    "gamma/mean": "mean γ",
}


class PairReport(NamedTuple):
    """Held-out pairs with their clean labels; intervals treat pairs of one prompt as dependent."""

    num_pairs: int
    accuracy_reference: Estimate | None  # share with log π_ref(chosen) > log π_ref(rejected)
    accuracy_policy: Estimate
    accuracy_gain: Estimate | None  # policy minus reference, pair by pair: much tighter than the two intervals
    reward_accuracy: Estimate  # share with a positive implicit reward margin, ties 1/2
    reward_margin: Estimate


def pair_report(table: dict[str, Tensor], prompts: Sequence[Any]) -> PairReport:
    """Summarise the rows of `PairMetrics.table`.

    Args:
        table: [N] each, in the order of the split.
        prompts: those of the N rows; equal ones form a cluster.
    """
    numbers: dict[str, int] = {}
    clusters = torch.tensor([numbers.setdefault(repr(prompt), len(numbers)) for prompt in prompts])
    table = {name: values.cpu() for name, values in table.items()}
    margin = table["rewards_chosen"] - table["rewards_rejected"]
    reference = preferred(table["reference_logps_chosen"] - table["reference_logps_rejected"])
    policy = preferred(table["logps_chosen"] - table["logps_rejected"])
    known = not bool(reference.isnan().any())
    return PairReport(
        num_pairs=len(margin),
        accuracy_reference=clustered_share(reference, clusters) if known else None,
        accuracy_policy=clustered_share(policy, clusters),
        accuracy_gain=clustered_mean(policy - reference, clusters) if known else None,
        reward_accuracy=clustered_share(preferred(margin), clusters),
        reward_margin=clustered_mean(margin, clusters),
    )


def report_table(pairs: PairReport, samples: Comparison | None, num_prompts: int, *, starts_at_zero: bool) -> Table:
    """Return the table: one row per measure, reference before policy.

    Args:
        pairs: on the test pairs.
        samples: on sampled completions, if there are any.
        num_prompts: of the samples.
        starts_at_zero: the implicit reward is a log-ratio to the reference, whose own margins are zero.
    """
    table = Table(title="before → after (95 % intervals)", box=box.SIMPLE_HEAD)
    for column in ("measure", "reference", "policy"):
        table.add_column(column)
    rows: list[tuple[str, Any, Any]] = [
        (f"pair accuracy, {pairs.num_pairs} clean pairs", pairs.accuracy_reference, pairs.accuracy_policy),
        ("its gain, pair by pair", None, pairs.accuracy_gain),
        ("implicit-reward accuracy", "0.500 (definition)" if starts_at_zero else None, pairs.reward_accuracy),
        ("reward margin", "0 (definition)" if starts_at_zero else None, pairs.reward_margin),
    ]
    if samples is not None and samples.win_rate is not None:
        rows += [
            (f"gold reward of samples, {num_prompts} prompts", samples.gold_reference, samples.gold_policy),
            ("win rate against the reference", "0.500 (definition)", samples.win_rate),
        ]
    if samples is not None:
        rows += [
            ("KL to the reference, nats per sequence", "0 (definition)", samples.kl),
            ("mean length, tokens", f"{samples.length_reference:.1f}", f"{samples.length_policy:.1f}"),
            ("distinct-2", f"{samples.distinct2_reference:.3f}", f"{samples.distinct2_policy:.3f}"),
        ]
    for measure, before, after in rows:
        table.add_row(measure, *("-" if value is None else str(value) for value in (before, after)))
    return table


def last_values_table(values: Mapping[str, Any]) -> Table:
    """Return the table for a run without a test split: what was logged last of training and validation.

    Args:
        values: by name; others are left out.
    """
    table = Table(title="at the end", box=box.SIMPLE_HEAD)
    for column in ("measure", "last step", "validation"):
        table.add_column(column)
    for name, measure in LAST_VALUES.items():
        found = [values.get(f"{split}/{name}") for split in ("train", "val")]
        if any(value is not None for value in found):
            table.add_row(measure, *("-" if value is None else f"{float(value):.3f}" for value in found))
    return table


def samples_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the side-by-side samples: prompt, reference, policy, with gold rewards where there are any."""
    table = Table(title="samples side by side", box=box.SIMPLE_HEAD, show_lines=True)
    for column in ("prompt", "reference", "policy"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in rows:
        texts = (row["prompt"], _sample_text(row, "reference"), _sample_text(row, "policy"))
        table.add_row(*map(Text, texts))
    return table


def as_json(value: Any) -> Any:
    """Turn named tuples into dicts, for json.dumps."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: as_json(item) for key, item in value._asdict().items()}
    return value


def _sample_text(row: dict[str, Any], who: str) -> str:
    gold = row[f"gold_{who}"]
    return row[who] if gold is None else f"({gold:+.2f}) {row[who]}"

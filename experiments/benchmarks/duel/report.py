"""Tables, CSV files and the plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from duel.plan import ARMS, MARGIN_TARGET
from duel.ratios import Ratio, Result, Spread

COLUMN = {"justify": "right", "no_wrap": True}


def arms_table(results: Sequence[Result], peak_rate: float, unit: str) -> Table:
    """What each arm cost."""
    table = Table(title=f"Per step: {unit}, median \\[min, max]; ours once for each group that took turns")
    table.add_column("training")
    table.add_column("arm")
    for name in ("seconds", "real tokens/s", "tokens in the model", "peak MiB", "GFLOP", "share of peak"):
        table.add_column(name, **COLUMN)
    for result in results:
        table.add_row(
            result.mode,
            ARMS[result.name].title,
            _spread(result.cost),
            f"{result.tokens_per_second:.0f}",
            f"{sum(step.facts.model_tokens for step in result.steps) / len(result.steps):.0f}",
            f"{result.peak:.0f}",
            f"{result.flops / 1e9:.0f}",
            f"{result.share_of_peak(peak_rate):.0%}",
        )
    return table


def ratios_table(found: Sequence[Ratio]) -> Table:
    """The ratios, with what is asked for beside them."""
    table = Table(title="Ratios; one number where the batches differ: all steps together")
    table.add_column("training")
    table.add_column("against")
    for name in ("time, TRL ÷ ours", "target", "peak memory, ours ÷ TRL", "target"):
        table.add_column(name, **COLUMN)
    for ratio in found:
        table.add_row(
            ratio.mode,
            ARMS[ratio.rival].title,
            _marked(_spread(ratio.time), ratio.time_target and ratio.time.median >= ratio.time_target),
            f"≥ {ratio.time_target}" if ratio.time_target else "",
            _marked(f"{ratio.memory:.2f}" if ratio.memory else "–", _fits(ratio)),
            f"≤ {ratio.memory_target}" if ratio.memory_target else "",
        )
    return table


def margin_line(seconds: float, step_seconds: float) -> str:
    """What the kl margin adds."""
    share = seconds / step_seconds
    return f"The kl margin adds {1000 * seconds:.2f} ms to a step: {share:.2%} (target: < {MARGIN_TARGET:.1%})"


def write_csv(folder: Path, results: Sequence[Result], found: Sequence[Ratio], peak_rate: float) -> None:
    """Write `steps.csv`, `arms.csv` and `ratios.csv`."""
    _write(
        folder / "steps.csv",
        [
            {
                "mode": result.mode, "arm": result.name, "group": result.group, "step": number,
                "seconds": step.cost, "wall_seconds": step.wall,
                "pairs": len(step.facts.rows), "real_tokens": real, "model_tokens": step.facts.model_tokens,
                "completion_tokens": step.facts.completion_tokens, "loss": step.facts.loss,
            }
            for result in results
            for number, (step, real) in enumerate(zip(result.steps, result.real_tokens, strict=True))
        ],
    )  # fmt: skip
    _write(
        folder / "arms.csv",
        [
            {
                "mode": result.mode, "arm": result.name, "group": result.group, **_columns("seconds", result.cost),
                "real_tokens_per_second": result.tokens_per_second, "peak_mib": result.peak,
                "flops": result.flops, "gemm_peak_flops": peak_rate, "share_of_peak": result.share_of_peak(peak_rate),
            }
            for result in results
        ],
    )  # fmt: skip
    _write(
        folder / "ratios.csv",
        [
            {
                "mode": ratio.mode, "rival": ratio.rival, **_columns("time_ratio", ratio.time),
                "time_target": ratio.time_target, "memory_ratio": ratio.memory, "memory_target": ratio.memory_target,
            }
            for ratio in found
        ],
    )  # fmt: skip


def plot(found: Sequence[Ratio], path: Path) -> None:
    """Draw time and memory ratios as bars, with their range and what is asked for."""
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(found)))
    colors = ["tab:blue" if ratio.mode == "lora" else "tab:orange" for ratio in found]
    left.barh(places, [ratio.time.median for ratio in found], color=colors)
    for place, ratio in zip(places, found, strict=True):
        if ratio.time.low is not None:
            left.plot([ratio.time.low, ratio.time.high], [place, place], color="black", marker="|")
    right.barh(places, [ratio.memory or 0 for ratio in found], color=colors)
    for axes, targets in (
        (left, [ratio.time_target for ratio in found]),
        (right, [ratio.memory_target for ratio in found]),
    ):
        for place, target in zip(places, targets, strict=True):
            if target:
                axes.plot([target, target], [place - 0.4, place + 0.4], color="tab:red", linestyle="--")
        axes.axvline(1, color="gray", linewidth=0.8)
    left.set_yticks(places, [f"{ratio.mode}: {ARMS[ratio.rival].title}" for ratio in found])
    left.invert_yaxis()
    left.set_xlabel("time of a step, TRL ÷ ours\n(black: min to max of the steps; red: target)")
    right.set_xlabel("peak memory, ours ÷ TRL")
    figure.savefig(path, dpi=120)


def _fits(ratio: Ratio) -> bool | None:
    return ratio.memory <= ratio.memory_target if ratio.memory and ratio.memory_target else None


def _marked(text: str, met: bool | float | None) -> str:
    return text if met is None else f"[green]{text}[/]" if met else f"[red]{text}[/]"


def _spread(values: Spread) -> str:
    return f"{values.median:.2f}" + ("" if values.low is None else f" \\[{values.low:.2f}, {values.high:.2f}]")


def _columns(name: str, values: Spread) -> dict[str, Any]:
    return {name: values.median, f"{name}_min": values.low, f"{name}_max": values.high}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
        writer.writeheader()
        writer.writerows(rows)

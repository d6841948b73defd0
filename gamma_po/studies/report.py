"""Write a finished study: tables for the terminal and as Markdown, every run as Parquet, figures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gamma_po.commit import source_commit
from gamma_po.errors import ConfigError
from gamma_po.files import write_bytes, write_text
from gamma_po.plotting import save_figure
from gamma_po.studies.figures import curves, figures
from gamma_po.studies.running import Cell
from gamma_po.studies.study import COMPARED, Pairing, Study, by_cell, place

SHORT = {"helps": "helps", "hurts": "hurts", "equivalent": "≈", "cannot": "?", "no": "no verdict"}
UNDECIDED = ("cannot tell", "no verdict", "not compared")
Rows = list[list[str]]


def new_folder(output: str) -> Path:
    """Make the study's folder.

    Raises:
        ConfigError: it exists and is not empty; nothing is ever replaced.
    """
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output={output!r} exists and is not an empty folder; allowed: a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_study(study: Study, folder: Path, command: Sequence[str], seconds: float) -> None:
    """Write all files of a study into its folder: runs, comparisons, tables, figures, configuration."""
    commit = source_commit()
    record = {"title": study.title, "command": list(command), "commit": commit, "seconds": round(seconds, 1)}
    record |= {"checks": dict(study.checks), "config": study.config}
    write_text(folder / "study.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    rows = [{"commit": commit} | row for row in study.rows]  # a run made earlier keeps the commit it was made with
    record["commits_of_runs"] = sorted({row["commit"] for row in rows})
    write_parquet(rows, folder / "runs.parquet")
    comparisons = [_comparison_row(pairing) for pairing in study.pairings]
    write_parquet(comparisons, folder / "comparisons.parquet")
    write_csv(comparisons, folder / "comparisons.csv")
    slopes = [_cell_columns(cell) | slope._asdict() for cell, slope in study.slopes.items()]
    write_parquet(slopes, folder / "slopes.parquet")
    write_parquet(_curve_rows(study), folder / "gradient_weights.parquet")
    write_text(folder / "tables.md", markdown(study, record))
    for name, figure in figures(study).items():
        save_figure(figure, folder / f"{name}.png")


def print_study(study: Study, console: Console) -> None:
    """Print the tables and the checks."""
    for title, header, rows in tables(study):
        table = Table(title=title, box=box.SIMPLE_HEAD)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print(Text(legend(study)))
    for text, held in study.checks:
        console.print(Text(f"{'held' if held else 'FAILED'}: {text}"))


def markdown(study: Study, record: dict[str, Any]) -> str:
    """Return the same tables as Markdown."""
    command = " ".join(record["command"])
    earlier = [commit for commit in record["commits_of_runs"] if commit != record["commit"]]
    made = f"commit {record['commit']}" + (f", runs made with {', '.join(earlier)}" if earlier else "")
    lines = [
        f"# {study.title}",
        "",
        f"`{command}`, {made}, {record['seconds']:g} s",
        "",
        legend(study),
    ]
    for title, header, rows in tables(study):
        lines += ["", f"## {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, rows)]
    lines += ["", "## checks", ""]
    lines += [f"- {'held' if held else 'FAILED'}: {text}" for text, held in study.checks]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(study: Study) -> list[tuple[str, list[str], Rows]]:
    """Title, header and rows of every table: a table per metric and ρ, fits, tuned configurations, a summary."""
    found = []
    for metric in study.metrics:
        for rho in sorted({row["rho"] for row in study.rows}):
            found.append(_metric_table(study, metric, rho))
    curve = [row for row in study.rows if row["stage"] == "beta curve"]
    if curve:
        found.append(_curve_table(study))
    if study.levels:
        found.append(_level_table(study))
    if study.slopes:
        found.append(_slope_table(study))
    if study.tuned:
        found.append(_tuned_table(study))
    return [*found, _summary_table(study)]


def legend(study: Study) -> str:
    """What the tables' signs mean, and how many comparisons were made."""
    seeds = len({row["seed"] for row in study.rows if row["stage"] in ("arms", "evaluation")})
    margin = study.config["margin"]
    return (
        f"Means over {seeds} seeds; differences in points of win rate, paired by seed, with 95 % intervals. "
        f"helps / hurts: the interval excludes 0 (≈ beside it: by less than ±{margin}); ≈: within ±{margin}, "
        "equivalent; ?: cannot tell; no verdict: nor can the oracle be told from the base loss. Seeds that are missing "
        "cannot be brought to the KL. "
        f"* survives Holm's correction for all {len(study.pairings)} comparisons."
        + (f" {study.scope}" if study.scope else "")
    )


def _metric_table(study: Study, metric: str, rho: float | None) -> tuple[str, list[str], Rows]:
    """An arm and its counterpart per row, a column per flip rate; arms without a counterpart show their level."""
    rows = [row for row in study.rows if row["stage"] in COMPARED and row["rho"] == rho]
    rates = sorted({row["flip_rate"] for row in rows})
    cells = by_cell(rows, metric)
    pairings = {(p.arm, p.against, p.flip_rate): p for p in study.pairings if p.metric == metric and p.rho == rho}
    lines: Rows = []
    seeds = len({row["seed"] for row in rows})
    for arm in dict.fromkeys(row["arm"] for row in rows):
        levels = [_level(list(cells.get((arm, rho, rate), {}).values())) for rate in rates]
        against = list(dict.fromkeys(other for name, other, _ in pairings if name == arm))
        lines.append([arm, "(level)", *levels])
        for other in against:
            found = [pairings.get((arm, other, rate)) for rate in rates]
            lines.append(["", f"− {other}", *(_shown(pairing, seeds) if pairing else "-" for pairing in found)])
    title = metric if rho is None else f"{metric}, ρ = {rho:g}"
    return title, ["arm", "", *(f"flips {rate:g}" for rate in rates)], lines


def _level_table(study: Study) -> tuple[str, list[str], Rows]:
    """Means over seeds of what is not compared."""
    groups: dict[tuple[str, float | None, float], list[dict[str, Any]]] = {}
    for row in study.rows:
        if row["stage"] in COMPARED:
            groups.setdefault((row["arm"], row["rho"], row["flip_rate"]), []).append(row)
    lines = [
        [arm, place(rho, rate), *(f"{math.fsum(row[name] for row in own) / len(own):.3f}" for name in study.levels)]
        for (arm, rho, rate), own in groups.items()
    ]
    return "means over seeds", ["arm", "where", *study.levels], lines


def _curve_table(study: Study) -> tuple[str, list[str], Rows]:
    rows = [row for row in study.rows if row["stage"] == "beta curve"]
    columns = sorted({(row["rho"], row["flip_rate"]) for row in rows})
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        line = [arm]
        for rho, rate in columns:
            own = [row for row in rows if (row["arm"], row["rho"], row["flip_rate"]) == (arm, rho, rate)]
            line.append(" / ".join(_level([row[metric] for row in own]) for metric in study.metrics))
        lines.append(line)
    header = ["base loss", *(place(rho, rate) for rho, rate in columns)]
    return f"β-curve of the base loss: {' / '.join(study.metrics)}", header, lines


def _slope_table(study: Study) -> tuple[str, list[str], Rows]:
    lines = [
        [arm, place(rho, rate), f"{s.a:.3f}", f"{s.b:.3f}", f"{s.explained:.4f}"]
        for (arm, rho, rate), s in study.slopes.items()
    ]
    return "matched slope: pulls fitted by s(a − b h)", ["arm", "where", "a", "b", "variance explained"], lines


def _tuned_table(study: Study) -> tuple[str, list[str], Rows]:
    lines = []
    for row in study.tuned:
        options = ", ".join(f"{name} {value:.3g}" for name, value in row["options"].items())
        tried = str(row["configurations"])
        rho = "-" if row["rho"] is None else f"{row['rho']:g}"
        lines.append([row["arm"], rho, f"{row['flip_rate']:g}", options, tried, row["at_edge"] or "-"])
    header = ["method", "ρ", "flips", "tuned options", "configurations", "still at an edge"]
    return "tuned configurations", header, lines


def _summary_table(study: Study) -> tuple[str, list[str], Rows]:
    """How often each comparison came out how, over all ρ and flip rates, by the last metric."""
    metric = study.metrics[-1]
    groups: dict[tuple[str, str], list[Pairing]] = {}
    for pairing in study.pairings:
        if pairing.metric == metric:
            groups.setdefault((pairing.arm, pairing.against), []).append(pairing)
    lines = []
    for (arm, other), found in groups.items():
        verdicts = [pairing.verdict for pairing in found]
        counts = [str(sum(verdict == word for verdict in verdicts)) for word in ("helps", "hurts")]
        small = str(sum("by less than" in verdict or verdict.startswith("equivalent") for verdict in verdicts))
        undecided = str(sum(verdict.startswith(UNDECIDED) for verdict in verdicts))
        means = [100 * pairing.difference.mean for pairing in found if pairing.known]
        span = f"{min(means):+.2f} to {max(means):+.2f}" if means else "-"
        lines.append([f"{arm} − {other}", span, *counts, small, undecided])
    margin = f"within ±{study.config['margin']}"
    header = ["comparison", "differences, points", "helps", "hurts", margin, "cannot tell"]
    return f"in short: {metric}, number of cells (ρ × flips)", header, lines


def _level(values: Sequence[float]) -> str:
    """The mean over seeds, and of how many of them, where it is not all."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return f"not reached ({len(values)} seeds)" if values else "-"
    share = "" if len(known) == len(values) else f" (reached on {len(known)} of {len(values)} seeds)"
    return f"{100 * sum(known) / len(known):.2f}{share}"


def _shown(pairing: Pairing, all_seeds: int) -> str:
    if not pairing.known:
        return pairing.verdict
    mean, low, high = (100 * value for value in pairing.difference[:3])
    word = SHORT[pairing.verdict.replace(",", " ").split()[0]]
    small = " ≈" if "less than" in pairing.verdict else ""
    star = "*" if pairing.survives_holm else ""
    seeds = f" ({pairing.difference.count} seeds)" if pairing.difference.count < all_seeds else ""
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] {word}{small}{star}{seeds}"


def _cell_columns(cell: Cell) -> dict[str, Any]:
    return dict(zip(("arm", "rho", "flip_rate"), cell, strict=True))


def _curve_rows(study: Study) -> list[dict[str, Any]]:
    """What the figure of gradient weights shows: a row per cell and bin."""
    return [
        _cell_columns(cell) | {"bin": number, "reward_margin": float(h), "gradient_weight": float(weight)}
        for cell, curve in curves(study.traces).items()
        for number, (h, weight) in enumerate(zip(*curve, strict=True))
    ]


def _comparison_row(pairing: Pairing) -> dict[str, Any]:
    values = {name: value for name, value in vars(pairing).items() if name != "difference"}
    return values | {f"difference_{name}": value for name, value in pairing.difference._asdict().items()}


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows; a column that only some have is empty in the others."""
    write_table(_table(rows), path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(_table(rows), buffer)
    write_bytes(path, buffer.getvalue())


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})

"""Figures of a run: pure functions from rows of numbers to matplotlib figures.

No pyplot: a figure belongs to its caller and no global state is touched, so that drawing is safe in training.
Colours are Okabe and Ito's, distinct for colour-blind readers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gamma_po.files import write_bytes

Series = Sequence[Sequence[float]]  # points (optimizer step, value)

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#666666"
STEP_LABEL = "optimizer step"
SMOOTH_FROM_POINTS = 60
GRID_BINS = 31  # odd: a constant falls into the middle of a bin
NO_RANGE = 1e-5
LEAST_VISIBLE = 1e-3
FONT = 11


class HistogramRow(NamedTuple):
    """A histogram of the pairs of optimizer steps first_step + 1 to last_step, in bins of equal width."""

    first_step: int
    last_step: int
    low: float
    high: float
    counts: Sequence[int]


def loss_figure(train: Series, validation: Series = ()) -> Figure:
    """Draw the loss over the steps of training.

    Args:
        train: a point per optimizer step; with many, a moving mean is drawn over them.
        validation: a point per validation.
    """
    figure, (axes,) = _stacked(1)
    _draw_series(axes, train, validation)
    _label(axes, title="Loss", y="loss per pair")
    axes.set_xlabel(STEP_LABEL, fontsize=FONT)
    return figure


def reward_margin_figure(
    *,
    margins: Series,
    accuracies: Series,
    validation_margins: Series = (),
    validation_accuracies: Series = (),
) -> Figure:
    """Draw the mean reward margin, and below it the share of pairs ranked correctly.

    Args:
        margins: points (step, mean of h in reward units) of training.
        accuracies: points (step, share of pairs with h > 0, ties half, 0 to 1) of training.
        validation_margins: as `margins`, of validation.
        validation_accuracies: as `accuracies`, of validation.
    """
    figure, (above, below) = _stacked(2)
    _draw_series(above, margins, validation_margins)
    above.axhline(0.0, color=GREY, linewidth=0.8, zorder=0)
    _label(above, title="Reward margin", y="mean margin h\n(reward units)")
    _draw_series(below, accuracies, validation_accuracies)
    below.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    below.set_ylim(-0.03, 1.03)
    below.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    _label(below, title="Accuracy", y="pairs with h > 0")
    below.set_xlabel(STEP_LABEL, fontsize=FONT)
    return figure


def histogram_over_time_figure(panels: Mapping[str, Sequence[HistogramRow]], *, title: str) -> Figure:
    """Draw histograms over the steps of training as heat-maps, with the first and the last beside them.

    Colour is the number of pairs in a bin relative to the fullest bin of the same steps, so that narrow and
    wide distributions are equally visible; the lines are the median and the 10th and 90th percentile.

    Args:
        panels: label of the value, with its unit, -> histograms in the order of their steps, at least one.
        title: of the whole figure.
    """
    figure = Figure(figsize=(10, 0.8 + 3.1 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=FONT + 2)
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row", width_ratios=(3, 1))
    for (heat, side), (label, rows) in zip(grid, panels.items(), strict=True):
        edges = _common_edges(rows)
        heights = np.stack([_heights(row, edges) for row in rows])
        _draw_heat(figure, heat, rows, edges, heights)
        heat.set_ylabel(label, fontsize=FONT)
        _draw_first_and_last(side, rows, edges, heights)
    grid[-1, 0].set_xlabel(STEP_LABEL, fontsize=FONT)
    grid[-1, 1].set_xlabel("relative to\nfullest bin", fontsize=FONT)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG so that `path` is either absent, as it was, or complete."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean over `window` (odd) values, over fewer at both ends.

    >>> moving_mean(np.array([1.0, 2.0, 6.0]), 3).tolist()
    [1.5, 3.0, 4.0]
    """
    ones = np.ones(window)
    return np.convolve(values, ones, mode="same") / np.convolve(np.ones_like(values), ones, mode="same")


def _stacked(rows: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(8, 1.2 + 3.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]


def _label(axes: Axes, *, title: str, y: str) -> None:
    axes.set_title(title, fontsize=FONT + 2)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=FONT - 1, frameon=False)


def _draw_series(axes: Axes, train: Series, validation: Series) -> None:
    steps, values = np.asarray(train, dtype=float).reshape(-1, 2).T
    if len(steps) >= SMOOTH_FROM_POINTS:
        window = len(steps) // 30 * 2 + 1
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        smooth = moving_mean(values, window)
        axes.plot(steps, smooth, color=BLUE, linewidth=2, label=f"training, mean of {window} steps")
    else:
        axes.plot(steps, values, color=BLUE, linewidth=1.5, marker=".", label="training")
    if len(validation):
        at, measured = np.asarray(validation, dtype=float).T
        axes.plot(at, measured, color=VERMILLION, linewidth=1.5, marker="o", markersize=5, label="validation")


def _common_edges(rows: Sequence[HistogramRow]) -> np.ndarray:
    """Edges of a grid over all bins that hold a pair; ±0.5 around values that do not vary."""
    occupied = [own[[k, k + 1]] for row in rows for own in [_edges(row)] for k in np.flatnonzero(row.counts)]
    low, high = np.min(occupied), np.max(occupied)
    centre = (low + high) / 2
    if high - low < NO_RANGE * max(1.0, abs(centre)):
        low, high = centre - 0.5, centre + 0.5
    return np.linspace(low, high, GRID_BINS + 1)


def _edges(row: HistogramRow) -> np.ndarray:
    return np.linspace(row.low, row.high, len(row.counts) + 1)


def _cumulative(row: HistogramRow) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(row.counts)]) / np.sum(row.counts)


def _heights(row: HistogramRow, edges: np.ndarray) -> np.ndarray:
    """Spread each bin evenly over the bins of `edges` that it touches; relative to the fullest of them."""
    shares = np.diff(np.interp(edges, _edges(row), _cumulative(row), left=0.0, right=1.0))
    return shares / shares.max()


def _draw_heat(
    figure: Figure, axes: Axes, rows: Sequence[HistogramRow], edges: np.ndarray, heights: np.ndarray
) -> None:
    at = np.array([rows[0].first_step, *(row.last_step for row in rows)], dtype=float)
    visible = np.ma.masked_less(heights.T, LEAST_VISIBLE)
    mesh = axes.pcolormesh(at, edges, visible, cmap="Blues", vmin=0.0, vmax=1.0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label("pairs, relative to fullest bin", fontsize=FONT - 2)
    lines = ((0.9, ":", None), (0.5, "-", "median"), (0.1, ":", "10th and 90th percentile"))
    for share, style, label in lines:
        values = [np.interp(share, _cumulative(row), _edges(row)) for row in rows]
        axes.stairs(values, at, baseline=None, color=VERMILLION, linestyle=style, linewidth=1.5, label=label)
    padding = 0.03 * (edges[-1] - edges[0])
    axes.set_ylim(edges[0] - padding, edges[-1] + padding)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axes, columns=2)


def _draw_first_and_last(axes: Axes, rows: Sequence[HistogramRow], edges: np.ndarray, heights: np.ndarray) -> None:
    ends = [(0, GREY), (-1, BLUE)] if len(rows) > 1 else [(0, BLUE)]
    for position, colour in ends:
        row = rows[position]
        label = f"steps {row.first_step + 1}-{row.last_step}"
        look: dict[str, Any] = {"orientation": "horizontal", "color": colour}
        axes.stairs(heights[position], edges, fill=True, alpha=0.25, **look)
        axes.stairs(heights[position], edges, linewidth=1.5, label=label, **look)
    axes.set_xlim(0.0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes, columns=1)


def _legend_above(axes: Axes, *, columns: int) -> None:
    axes.tick_params(labelsize=FONT - 1)
    axes.legend(
        fontsize=FONT - 2,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        borderpad=0.1,
    )

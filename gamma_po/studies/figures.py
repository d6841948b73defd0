"""Figures of a study: reward against KL, gradient weight against reward margin, phase diagram."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from gamma_po.studies.running import Cell, Row, Trace
from gamma_po.studies.slope import Slope
from gamma_po.studies.study import COMPARED, Study, place

Curve = tuple[np.ndarray, np.ndarray]  # reward margin and gradient weight, a mean per bin each
STRENGTH = re.compile(r"kl γ0=([\d.]+) τ=([\d.]+)$")
BINS = 24
FONT = 10
KL_TICKS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DARK = 0.6  # share of the colour scale from which black text is hard to read
SMALLEST_HEIGHT = 4.8  # inches: room for the legend


def figures(study: Study) -> dict[str, Figure]:
    """Return what can be drawn of a study, by file name."""
    found = {}
    if all("win_rate" in row for row in study.rows):  # not of a language model without gold rewards
        found["frontier"] = frontier_figure(study.rows)
    if study.traces:
        found["gradient_weight"] = weight_figure(curves(study.traces), study.slopes)
    if any(STRENGTH.match(p.arm) and p.known and p.metric == study.metrics[-1] for p in study.pairings):
        found["phase_diagram"] = phase_figure(study)
    return found


def curves(traces: Mapping[Cell, Trace]) -> dict[Cell, Curve]:
    """Return what `weight_figure` draws of traces: means in bins of equal numbers of pairs."""
    return {cell: _binned(trace) for cell, trace in traces.items()}


def frontier_figure(all_rows: Sequence[Row]) -> Figure:
    """Draw the gold win rate against KL: as trained (dots), and rescaled to common KLs (lines).

    A panel per ρ and flip rate; means over seeds. A line ends where one of its seeds cannot reach the KL.
    """
    rows = [row for row in all_rows if row["stage"] in COMPARED]
    figure, panels = _panels(rows)
    kls = sorted(float(name[len("win_rate_kl") :]) for name in rows[0] if name.startswith("win_rate_kl"))
    arms, named = list(dict.fromkeys(row["arm"] for row in rows)), set()
    for (rho, flips), axes in panels.items():
        for number, arm in enumerate(arms):
            own = [row for row in rows if (row["arm"], row["rho"], row["flip_rate"]) == (arm, rho, flips)]
            if not own:
                continue
            colour, dashes, marker = style(number, len(arms))
            label = None if arm in named else arm  # some arms are in the panels with flips only
            named.add(arm)
            line = [_mean([row[f"win_rate_kl{kl:g}"] for row in own]) for kl in kls]
            axes.plot(kls, line, linestyle=dashes, color=colour, lw=1, alpha=0.7)
            point = _mean([row["kl"] for row in own]), _mean([row["win_rate"] for row in own])
            axes.plot(*point, marker, color=colour, ms=4, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(KL_TICKS))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, "KL(π ‖ π_ref), nats", "gold win rate against π_ref")
    return figure


def weight_figure(curves: Mapping[Cell, Curve], slopes: Mapping[Cell, Slope]) -> Figure:
    """Draw the mean gradient weight of pairs by their reward margin, and what the matched slope makes of it."""
    rhos = sorted({cell[1] for cell in curves})
    flips = sorted({cell[2] for cell in curves})
    figure = Figure(figsize=(3.6 * len(flips) + 2.4, max(SMALLEST_HEIGHT / 1.5, 2.8 * len(rhos))), layout="constrained")
    grid = figure.subplots(len(rhos), len(flips), squeeze=False, sharey=True)
    named = set()
    for (arm, rho, rate), (h, weight) in curves.items():
        axes = grid[rhos.index(rho), flips.index(rate)]
        axes.set_title(place(rho, rate), fontsize=FONT)
        names = sorted({cell[0] for cell in curves})
        colour = style(names.index(arm), len(names))[0]
        first = arm not in named
        named.add(arm)
        axes.plot(h, weight, "-", color=colour, lw=1.5, label=arm if first else None)
        if (arm, rho, rate) in slopes:
            slope = slopes[arm, rho, rate]
            fitted = 1 / (1 + np.exp(slope.b * h - slope.a))
            axes.plot(h, fitted, "--", color=colour, lw=1, label=f"{arm}: s(a - b h)" if first else None)
    _legend(figure, "reward margin h, reward units", "mean gradient weight")
    return figure


def phase_figure(study: Study) -> Figure:
    """Draw the gain over the base loss for every γ0 and τ, a panel per ρ and flip rate; dots are significant."""
    pairings = [p for p in study.pairings if STRENGTH.match(p.arm) and p.metric == study.metrics[-1] and p.known]
    rhos, flips = sorted({p.rho for p in pairings}), sorted({p.flip_rate for p in pairings})
    gamma0s, taus = (sorted({float(STRENGTH.match(p.arm)[k]) for p in pairings}) for k in (1, 2))
    bound = max(abs(p.difference.mean) for p in pairings)
    figure = Figure(figsize=(3.2 * len(flips) + 1, 2.8 * len(rhos) + 0.5), layout="constrained")
    grid = figure.subplots(len(rhos), len(flips), squeeze=False)
    for pairing in pairings:
        axes = grid[rhos.index(pairing.rho), flips.index(pairing.flip_rate)]
        gamma0, tau = (float(value) for value in STRENGTH.match(pairing.arm).groups())
        at = taus.index(tau), gamma0s.index(gamma0)
        share = pairing.difference.mean / bound
        axes.add_patch(_square(at, colormaps["RdBu"](0.5 + 0.5 * share)))
        text = f"{100 * pairing.difference.mean:+.2f}{'•' if pairing.survives_holm else ''}"
        ink = "white" if abs(share) > DARK else "black"
        axes.text(*at, text, ha="center", va="center", fontsize=FONT - 2, color=ink)
        axes.set_title(place(pairing.rho, pairing.flip_rate), fontsize=FONT)
        axes.set_xlim(-0.5, len(taus) - 0.5)
        axes.set_ylim(-0.5, len(gamma0s) - 0.5)
        axes.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
        axes.set_yticks(range(len(gamma0s)), [f"{gamma0:g}" for gamma0 in gamma0s])
    figure.suptitle(f"{study.metrics[-1]} minus the base loss, points; • significant after Holm", fontsize=FONT)
    figure.supxlabel("τ", fontsize=FONT)
    figure.supylabel("γ0", fontsize=FONT)
    return figure


def style(number: int, count: int) -> tuple[tuple[float, ...], str, str]:
    """Return colour, dashes and marker of one of many lines; no two lines of a figure share all of a colour.

    Neighbours in the list differ in dashes and marker too, as hues of many lines lie close together.
    """
    kinds = (("-", "o"), ("--", "s"), (":", "^"))
    shade = 0.5 + 0.4 * ((number // len(kinds)) % 2)
    colour = hsv_to_rgb((number / count, 0.85, shade))
    return (*map(float, colour),), *kinds[number % len(kinds)]


def _square(at: tuple[int, int], colour: tuple[float, ...]) -> Rectangle:
    return Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, color=colour, lw=0)


def _panels(rows: Sequence[Row]) -> tuple[Figure, dict[tuple[float, float], Axes]]:
    rhos, flips = (sorted({row[name] for row in rows}) for name in ("rho", "flip_rate"))
    figure = Figure(figsize=(3.4 * len(flips) + 3, max(SMALLEST_HEIGHT, 2.8 * len(rhos))), layout="constrained")
    grid = figure.subplots(len(rhos), len(flips), squeeze=False, sharex=True)
    panels = {}
    for i, rho in enumerate(rhos):
        for j, rate in enumerate(flips):
            panels[rho, rate] = grid[i, j]
            grid[i, j].set_title(place(rho, rate), fontsize=FONT)
            grid[i, j].grid(color="#dddddd", linewidth=0.6)
    return figure, panels


def _legend(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=FONT)
    figure.supylabel(y, fontsize=FONT)
    figure.legend(loc="outside right upper", fontsize=FONT - 2, frameon=False)


def _binned(trace: Trace) -> Curve:
    """Means of h and weight in bins of equal numbers of pairs."""
    order = trace.reward_margin.argsort()
    h, weight = (torch.chunk(values[order].double(), BINS) for values in (trace.reward_margin, trace.weight))
    return tuple(np.array([float(part.mean()) for part in parts]) for parts in (h, weight))


def _mean(values: Sequence[float]) -> float:
    """The mean over all seeds; NaN where one of them has no value, as a mean over some would be another line."""
    return math.fsum(values) / len(values)

"""Figures: what is drawn is what was given, and files appear complete."""

from __future__ import annotations

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from gamma_po import plotting
from gamma_po.plotting import (
    HistogramRow,
    histogram_over_time_figure,
    loss_figure,
    moving_mean,
    reward_margin_figure,
    save_figure,
)


def lines(figure: Figure, axes: int = 0) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in figure.axes[axes].get_lines()}


def test_a_short_loss_curve_is_drawn_point_by_point() -> None:
    train, validation = [(1, 0.7), (2, 0.6), (3, 0.65)], [(3, 0.68)]
    drawn = lines(loss_figure(train, validation))
    assert drawn["training"].tolist() == [list(point) for point in train]
    assert drawn["validation"].tolist() == [[3, 0.68]]


def test_a_long_loss_curve_keeps_its_points_under_a_moving_mean() -> None:
    train = [(step, float(step % 2)) for step in range(1, 601)]
    figure = loss_figure(train)
    raw, smooth = (line.get_ydata() for line in figure.axes[0].get_lines())
    window = int(figure.axes[0].get_lines()[1].get_label().split()[-2])
    assert raw.tolist() == [value for _, value in train]
    inner = smooth[window:-window]
    # An odd window over 0, 1, 0, 1, ... has one value too many of either kind.
    assert np.abs(inner - 0.5).max() == pytest.approx(0.5 / window)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_the_moving_mean_is_the_mean_of_the_values_within_half_a_window(window: int) -> None:
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(0, i - window // 2) : i + window // 2 + 1].mean() for i in range(20)]
    np.testing.assert_allclose(moving_mean(values, window), expected, atol=1e-12)


def test_margins_and_accuracies_share_their_steps() -> None:
    figure = reward_margin_figure(
        margins=[(1, 0.0), (2, 0.4)],
        accuracies=[(1, 0.5), (2, 1.0)],
        validation_margins=[(2, 0.3)],
        validation_accuracies=[(2, 0.75)],
    )
    assert lines(figure, 0)["training"].tolist() == [[1, 0.0], [2, 0.4]]
    assert lines(figure, 1)["validation"].tolist() == [[2, 0.75]]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_every_axis_of_every_figure_says_what_it_shows() -> None:
    row = HistogramRow(0, 5, 0.0, 1.0, [1, 2, 3])
    figures = [
        loss_figure([(1, 0.5)]),
        reward_margin_figure(margins=[(1, 0.1)], accuracies=[(1, 1.0)]),
        histogram_over_time_figure({"γ (reward units)": [row]}, title="Distribution"),
    ]
    for figure in figures:
        panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]  # not the colour bars
        assert all(axes.get_ylabel() for axes in panels if axes.get_subplotspec().is_first_col())
        assert all(axes.get_xlabel() for axes in panels if axes.get_subplotspec().is_last_row())
        assert figure.get_suptitle() or all(axes.get_title() for axes in panels)


def heat(figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """Columns (one per histogram) and y edges of the first heat-map."""
    mesh = figure.axes[0].collections[0]
    return mesh.get_array().filled(0.0).T, mesh.get_coordinates()[:, 0, 1]


def test_the_heat_map_puts_pairs_where_their_values_are() -> None:
    bins = plotting.GRID_BINS
    uniform = HistogramRow(0, 10, 0.0, 2.0, [5, 5, 5, 5])
    upper_half = HistogramRow(10, 20, 0.0, 2.0, [0, 0, 4, 4])
    columns, edges = heat(histogram_over_time_figure({"γ": [uniform, upper_half]}, title=""))
    assert (edges[0], edges[-1]) == (0.0, 2.0)
    np.testing.assert_allclose(columns[0], 1.0)
    centres = (edges[:-1] + edges[1:]) / 2
    expected = np.where(centres > 1, 1.0, 0.0)
    expected[bins // 2] = 0.5  # the bin that 1.0 cuts in half
    np.testing.assert_allclose(columns[1], expected, atol=1e-9)


def test_a_constant_is_a_line_in_the_middle_of_a_visible_range() -> None:
    constant = HistogramRow(0, 10, 1.0 - 1e-6, 1.0 + 1e-6, [0, 7, 0])
    columns, edges = heat(histogram_over_time_figure({"γ": [constant]}, title=""))
    assert (edges[0], edges[-1]) == pytest.approx((0.5, 1.5))
    assert np.flatnonzero(columns[0]).tolist() == [plotting.GRID_BINS // 2]


def test_the_side_panel_compares_the_first_steps_with_the_last() -> None:
    rows = [HistogramRow(20 * k, 20 * (k + 1), 0.0, 1.0, [1, k + 1]) for k in range(3)]
    figure = histogram_over_time_figure({"γ": rows}, title="")
    assert figure.axes[1].get_legend_handles_labels()[1] == ["steps 1-20", "steps 41-60"]


def test_a_saved_figure_is_a_complete_png_and_nothing_else_is_left(tmp_path) -> None:
    path = tmp_path / "plots" / "loss.png"
    save_figure(loss_figure([(1, 0.7)]), path)
    save_figure(loss_figure([(1, 0.7), (2, 0.6)]), path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert height > 500 and width > 1000
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(loss_figure([(1, 0.7)]), tmp_path / "loss.png")
    assert dict(matplotlib.rcParams) == before

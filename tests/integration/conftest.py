"""Fixtures shared by the tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gamma_po.callbacks import histograms, plots
from gamma_po.plotting import save_figure
from tests.runs import draw_no_figures


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Runs in this process make their figures and do not draw them, but for a test that asks for `drawn_figures`.

    Commands that are started as such, in processes of their own, draw theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        draw_no_figures(patch)
        yield


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their figures."""
    for module in (plots, histograms):
        monkeypatch.setattr(module, "save_figure", save_figure)

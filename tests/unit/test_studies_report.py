"""What a study says where a number is missing, where nothing was checked, and where it has no power."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from gamma_po.errors import DataError
from gamma_po.studies import lm_study
from gamma_po.studies.figures import curves
from gamma_po.studies.lm_plan import LanguageArm, LanguageStudy, plan
from gamma_po.studies.lm_study import collect, result_file
from gamma_po.studies.measures import Judge
from gamma_po.studies.reading import read_study
from gamma_po.studies.report import legend, tables, write_study
from gamma_po.studies.running import Trace, measured
from gamma_po.studies.slope import Slope
from gamma_po.studies.study import Study, common_checks, compare, oracle_check
from gamma_po.studies.worlds import HeldOut
from tests.tiny import tiny_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
AT_KL = "win_rate_kl1"
NAN = math.nan
LEVELS = {  # by arm: the win rate at a KL of every seed
    "dpo": (0.50, 0.51, 0.52, 0.53),
    "good": (0.60, 0.62, 0.61, 0.64),
    "few": (0.70, NAN, NAN, 0.60),
    "one": (0.70, NAN, NAN, NAN),
    "none": (NAN, NAN, NAN, NAN),
}


def rows_of(levels: dict[str, tuple[float, ...]], **more: Any) -> list[dict[str, Any]]:
    same = {"stage": "arms", "rho": 0.5, "flip_rate": 0.4, "kl": 1.0, "win_rate": 0.6} | more
    return [
        same | {"arm": arm, "seed": seed, AT_KL: value}
        for arm, values in levels.items()
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def study() -> Study:
    rows = rows_of(LEVELS)
    against = {arm: ("dpo",) for arm in LEVELS if arm != "dpo"}
    traces = {("dpo", 0.5, 0.4): Trace(torch.linspace(-2, 2, 96), torch.linspace(1, 0, 96), torch.zeros(96))}
    return Study(
        title="made up", config={"margin": 0.01}, metrics=(AT_KL,), rows=rows, traces=traces,
        pairings=compare(rows, against, (AT_KL,), 0.01), slopes={("good", 0.5, 0.4): Slope(0.1, 0.9, 0.8)},
        checks=[("nothing", True)],
    )  # fmt: skip


def test_a_mean_says_on_how_many_seeds_the_kl_was_reached(study: Study) -> None:
    (_, _, lines), *_ = tables(study)
    levels = {line[0]: line[2] for line in lines if line[1] == "(level)"}
    assert levels == {
        "dpo": "51.50", "good": "61.75", "few": "65.00 (reached on 2 of 4 seeds)",
        "one": "70.00 (reached on 1 of 4 seeds)", "none": "not reached (4 seeds)",
    }  # fmt: skip


def test_a_comparison_without_two_common_seeds_stays_in_the_table(study: Study) -> None:
    _, _, lines = tables(study)[0]
    arms = [line[0] or lines[place - 1][0] for place, line in enumerate(lines)]
    shown = {arm: line[2] for arm, line in zip(arms, lines, strict=True) if line[1] == "− dpo"}
    assert shown["one"] == "not compared: 1 common seed" and shown["none"] == "not compared: 0 common seeds"
    assert shown["few"].endswith("(2 seeds)")
    assert len(study.pairings) == 4 and "all 4 comparisons" in legend(study)
    *_, (_, header, summary) = tables(study)
    undecided = {line[0]: line[header.index("cannot tell")] for line in summary}
    assert undecided["one − dpo"] == undecided["none − dpo"] == "1" and undecided["good − dpo"] == "0"


def test_holm_counts_comparisons_that_could_not_be_made() -> None:
    """Differences of 15 and 17 have t = 16 with one degree of freedom: p = 1 - 2/π atan(16) = 0.04."""
    rows = rows_of({"dpo": (0.0, 0.0), "good": (0.015, 0.017), "none": (NAN, NAN)})
    (alone,) = compare(rows, {"good": ("dpo",)}, (AT_KL,), 0.01)
    assert alone.difference.p == pytest.approx(1 - 2 / math.pi * math.atan(16)) and alone.survives_holm
    both = compare(rows, {"good": ("dpo",), "none": ("dpo",)}, (AT_KL,), 0.01)  # p must be below 0.025 now
    assert both[0].difference == alone.difference and not any(pairing.survives_holm for pairing in both)


def test_a_folder_gives_back_what_was_written(study: Study, tmp_path: Path) -> None:
    write_study(study, tmp_path, ["study"], 1.0)
    found = read_study(tmp_path)
    assert found.slopes == study.slopes and found.metric == AT_KL and found.missing == ""
    for cell, (h, weight) in curves(study.traces).items():
        assert found.curves[cell][0].tolist() == h.tolist() and found.curves[cell][1].tolist() == weight.tolist()
    assert [(row["arm"], row["seed"]) for row in found.rows] == [(row["arm"], row["seed"]) for row in study.rows]
    assert [row["verdict"] for row in found.comparisons] == [pairing.verdict for pairing in study.pairings]
    assert "reached on 2 of 4 seeds" in (tmp_path / "tables.md").read_text()


def test_a_folder_of_an_earlier_version_says_what_it_lacks_and_a_strange_one_is_refused(
    study: Study, tmp_path: Path
) -> None:
    write_study(study, tmp_path, ["study"], 1.0)
    (tmp_path / "slopes.parquet").unlink()
    found = read_study(tmp_path)
    assert "slopes.parquet" in found.missing and "gradient_weights" not in found.missing and not found.slopes
    (tmp_path / "runs.parquet").unlink()
    with pytest.raises(DataError, match=r"no runs\.parquet; allowed: the --output folder of a finished study"):
        read_study(tmp_path)


def test_a_study_without_fits_has_empty_files_of_them(study: Study, tmp_path: Path) -> None:
    plain = Study(
        title="t", config=study.config, metrics=study.metrics, rows=study.rows, pairings=study.pairings, checks=[]
    )
    write_study(plain, tmp_path, ["study"], 1.0)
    found = read_study(tmp_path)
    assert (found.slopes, found.curves, found.missing) == ({}, {}, "")
    assert pq.read_table(tmp_path / "slopes.parquet").num_rows == 0


def test_a_check_of_nothing_does_not_hold() -> None:
    for rows in ([], [{"equal_to_base": None}], [{"equal_to_base": None, "reference_error": None}]):
        assert [held for _, held in common_checks(rows)] == [False, False]
    assert oracle_check(rows_of({"oracle": (0.5, NAN)}), AT_KL, "dpo", "oracle")[0][1] is False


@pytest.mark.parametrize(
    ("error", "said", "holds"), [(3e-16, "3e-16", True), (2e-3, "0.002", False), (NAN, "nan", False)]
)
def test_the_check_of_the_reference_shows_the_number_that_it_saw(error: float, said: str, holds: bool) -> None:
    rows = [{"equal_to_base": True, "reference_error": error}, {"equal_to_base": None, "reference_error": error}]
    (equal, all_equal), (text, held) = common_checks(rows)
    assert all_equal and "in 1 of 1 runs" in equal
    assert f"at most {said} off" in text and "in 2 runs" in text and held is holds


def test_every_run_records_how_far_the_reference_is_from_half_against_itself() -> None:
    gold = torch.tensor([[0.0, 1.0, 2.0]])
    held_out = HeldOut(torch.zeros(1, 3, 1), torch.tensor([[0.2, 0.3, 0.5]]).log(), gold)
    judge = Judge(held_out)
    found = measured(judge, torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0)), ())
    assert found["reference_error"].shape == (4,) and bool((found["reference_error"] < 1e-12).all())
    judge.beats = judge.beats + 1e-3
    with pytest.raises(ArithmeticError, match="against itself"):
        measured(judge, torch.zeros(4, 1, 3), ())


GAINS = {  # of the oracle over the base loss, by seed -> whether it can be told from 0
    "large": ((0.10, 0.12, 0.11), True),
    "positive on average": ((0.30, -0.05, 0.02), False),
}
ARMS = {"dpo": {}, "kl": {"against": ["dpo"]}, "oracle": {"without_flipped": True, "against": ["dpo"]}}


@pytest.mark.parametrize("name", GAINS)
def test_a_language_study_gives_no_verdict_where_not_even_the_oracle_can_be_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains, holds = GAINS[name]
    result = collected(tmp_path, monkeypatch, gains)
    assert result.passed and not any("oracle" in text for text, _ in result.checks)  # it is a result, not a check
    (said,) = {p.verdict for p in result.pairings if p.arm == "kl" and p.metric == "win_rate_kl0.1"}
    assert said == ("equivalent within ±0.02" if holds else "no verdict: equivalent within ±0.02, and no power to tell")
    assert ("No verdict at flips 0.4 by win_rate_kl0.1" in legend(result)) is not holds
    cells = [cell for title, _, lines in tables(result) if title == "win_rate_kl0.1" for line in lines for cell in line]
    assert any("no verdict" in cell for cell in cells) is not holds
    assert any(cell.endswith("] ≈") for cell in cells) is holds


def collected(root: Path, monkeypatch: pytest.MonkeyPatch, gains: tuple[float, ...]) -> Study:
    """A study whose runs are made up: KL differs from DPO by almost nothing, the oracle by `gains`."""
    data = {split: str(write_rows(root / f"{split}.jsonl", tiny_rows(6, seed=1))) for split in ("train", "test")}
    fit = {"trainer": {"max_steps": 4}, "model": {"loss": {"class_path": "DPO"}}, "data": data}
    (root / "fit.yaml").write_text(yaml.safe_dump(fit))
    arms = {arm: LanguageArm(**options) for arm, options in ARMS.items()}
    study = LanguageStudy(fit=str(root / "fit.yaml"), arms=arms, noise=[0.4], seeds=len(gains), kls=[0.1])
    units = plan(study, root)
    for run in (run for unit in units for run in unit):
        level = 0.6 + 0.01 * run.seed + {"dpo": 0.0, "kl": 0.0001 * run.seed, "oracle": gains[run.seed]}[run.arm]
        row = {"arm": run.arm, "seed": run.seed, "rho": None, "flip_rate": 0.4, "loss": "{}", "margin": "{}"}
        row |= {"mask": "flipped" if run.without_flipped else "none", "folder": "x", "sample_prompts": 64}
        row |= {"test_pairs": 64, "win_rate_kl0.1": level, "reference_error": 1e-16}
        result_file(root, run).parent.mkdir(exist_ok=True)
        result_file(root, run).write_text(json.dumps(row))
    trace = Trace(torch.linspace(-1, 1, 8), torch.linspace(1, 0, 8), torch.zeros(8, dtype=torch.bool))
    monkeypatch.setattr(lm_study, "read_trace", lambda folder: trace)
    return collect(study, units, root)


def test_the_committed_study_calls_nothing_equivalent_where_it_has_no_power() -> None:
    rows = pq.read_table(ROOT / "experiments" / "studies" / "sentiment" / "comparisons.parquet").to_pylist()
    oracle = {(row["flip_rate"], row["metric"]): row for row in rows if row["arm"].startswith("oracle")}
    powerless = {spot for spot, row in oracle.items() if row["difference_low"] <= 0}
    assert powerless
    said = [row["verdict"] for row in rows if (row["flip_rate"], row["metric"]) in powerless]
    assert said and not any(verdict.startswith("equivalent") for verdict in said)

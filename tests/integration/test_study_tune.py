"""A tuned study on a tiny language model, from the command line to its files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from gamma_po.__main__ import main
from gamma_po.callbacks import histograms, plots
from gamma_po.cli import PreferenceCLI
from gamma_po.commands.arguments import parse
from gamma_po.commands.study_lm import placed
from gamma_po.commands.study_tune import TuneOptions
from gamma_po.studies.lm_tuning import first_units
from tests.tiny import save_tiny_model, tiny_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
RATE = "model.optimizer.init_args.lr"
ARMS = {
    "dpo": {"grid": {RATE: [0.002, 0.004]}},
    "kl": {
        "set": {"model.margin": {"class_path": "KL", "init_args": {"gamma0": 1.0, "tau": 0.5}}},
        "grid": {RATE: [0.002, 0.004]},
        "against": ["dpo", "kl, matched slope"],
    },
    "kl, matched slope": {"matched_to": "kl", "against": ["dpo"]},
    "oracle": {"without_flipped": True, "tuned_as": "dpo", "against": ["dpo"]},
}
METRIC = "win_rate_kl0.001"
ROUNDING = 1e-9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    save_tiny_model(root / "model")
    for seed, (split, size) in enumerate({"train": 16, "test": 10, "other": 8}.items()):
        rows = tiny_rows(size, seed=seed)
        write_rows(root / f"{split}.jsonl", [row | {"reward_chosen": 1.0, "reward_rejected": -1.0} for row in rows])
    fit = {
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1},
        "model": {
            "policy": {"path": str(root / "model")},
            "loss": {"class_path": "DPO", "init_args": {"beta": 0.1}},
            "margin": {"class_path": "NoMargin"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
        "data": {"train": str(root / "train.jsonl"), "test": str(root / "test.jsonl"), "batch_size": 4},
        "report": {"num_prompts": 2, "gold": "VaderSentiment", "sampling": {"max_new_tokens": 2}},
    }
    (root / "fit.yaml").write_text(yaml.safe_dump(fit))
    study = {"fit": str(root / "fit.yaml"), "noise": [0.3], "seeds": 2, "kls": [0.001], "arms": ARMS}
    study["tuning_set"] = {"data.test": str(root / "other.jsonl"), "report": {"num_prompts": 0}}
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    with pytest.MonkeyPatch.context() as during:
        for module in (plots, histograms):  # half of such a short run is figures, which other tests look at
            during.setattr(module, "save_figure", lambda figure, path: None)
        assert main(command(root)) == 0
    return root


def command(root: Path) -> list[str]:
    words = ["study", "tune", "--config", str(root / "study.yaml"), "--output", str(root / "out")]
    return [*words, "--workers", "1", "--tuning_seeds", "1"]


def results(root: Path, stage: str) -> list[dict]:
    files = (root / "out" / "noise-0.3" / stage / "results").glob("*.json")
    return [json.loads(file.read_text()) for file in files]


def test_an_arm_is_compared_with_the_learning_rate_that_was_best_in_tuning(root: Path) -> None:
    tuning, evaluation = results(root, "tuning"), results(root, "evaluation")
    assert {row["seed"] for row in tuning} == {1_000_000} and {row["seed"] for row in evaluation} == {0, 1}
    best = {}
    for name in ("dpo", "kl"):
        means = {row["learning_rate"]: row[METRIC] for row in tuning if row["arm"].startswith(f"{name}: ")}
        assert {0.002, 0.004} < set(means) and len(means) == 3  # two, and one beyond an edge
        best[name] = max(means, key=lambda rate: means[rate])
    follows = {"dpo": "dpo", "kl": "kl", "kl, matched slope": "kl", "oracle": "dpo"}
    assert {(row["arm"], row["seed"]) for row in evaluation} == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    assert all(row["learning_rate"] == best[follows[row["arm"]]] for row in evaluation)
    assert all(math.isnan(row["sample_gold"]) and row["test_pairs"] == 8 for row in tuning)
    assert all(not math.isnan(row["sample_gold"]) and row["test_pairs"] == 10 for row in evaluation)
    rows = pq.read_table(root / "out" / "noise-0.3" / "tuning.parquet").to_pylist()
    assert {(row["arm"], json.loads(row["options"])[RATE]) for row in rows if row["chosen"]} == set(best.items())
    runs = pq.read_table(root / "out" / "noise-0.3" / "tuning_runs.parquet").to_pylist()
    assert sorted(row[METRIC] for row in runs) == pytest.approx(sorted(row[METRIC] for row in rows), abs=ROUNDING)


def test_the_report_is_that_of_a_study_with_what_was_tuned_and_its_edges(root: Path) -> None:
    folder = root / "out" / "noise-0.3"
    rows = pq.read_table(folder / "tuning.parquet").to_pylist()
    text = (folder / "evaluation" / "tables.md").read_text()
    table = text.split("## tuned configurations")[1].split("\n## ")[0]
    for row in rows:
        if row["chosen"]:
            assert f"| {row['arm']} | - | 0.3 | {row['configuration']} | 3 | {row['at_edge'] or '-'} |" in table
    assert text.startswith("# S3, P2") and "tuned_as" in text and "other.jsonl" in text
    assert json.loads((folder / "evaluation" / "study.json").read_text())["config"]["protocol"] == "P2"
    assert {"runs.parquet", "comparisons.csv", "pairs.parquet"} <= {file.name for file in folder.rglob("evaluation/*")}


def test_the_reference_is_scored_once_for_all_runs(root: Path) -> None:
    scored = []
    for log in (root / "out").rglob("log.txt"):
        scored += [int(number) for number in re.findall(r"read from the cache, (\d+)\s+scored", log.read_text())]
    assert sum(scored) == 16 + 10 + 8 and len(scored) == 2 * (6 + 8)


def test_repeated_it_runs_nothing_and_study_lm_continues_what_was_chosen(root: Path) -> None:
    def written() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in (root / "out").rglob("results/*.json")}

    before = written()
    assert main(command(root)) == 0
    folder = root / "out" / "noise-0.3"
    words = ["--config", str(folder / "tuned.yaml"), "--output", str(folder / "evaluation"), "--workers", "1"]
    assert main(["study", "lm", *words]) == 0
    assert written() == before and len(before) == 6 + 8


def test_the_shipped_study_is_a_list_of_runs_that_fit_understands(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "experiments/studies/sentiment_tuned.yaml", "--output", str(tmp_path / "out")]
    study = parse(TuneOptions, words, "study tune")
    runs = [run for unit in first_units(study, tmp_path, "cpu") for run in unit]
    tuning = [run for run in runs if run.seed >= 1_000_000]
    assert len(tuning) == 4 * 4 * study.tuning_seeds and len(runs) - len(tuning) == 7 * study.seeds
    robust = next(run for run in runs if run.arm.startswith("robust"))
    for run in (tuning[0], runs[0], robust):  # the options that differ otherwise are those of other shipped studies
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(placed(run.config, run, tmp_path), allow_unicode=True))
        with pytest.raises(SystemExit) as stop:
            PreferenceCLI(["fit", "--config", str(file), "--model.policy.path", tiny_model_path, "--print_config"])
        assert stop.value.code == 0

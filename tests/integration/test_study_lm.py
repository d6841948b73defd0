"""A study on a tiny language model, from the command line to its files."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from nbclient import NotebookClient

from gamma_po.__main__ import main
from gamma_po.callbacks import histograms, plots
from gamma_po.cli import PreferenceCLI
from gamma_po.commands.arguments import parse
from gamma_po.commands.study_lm import LanguageOptions, messages_go_to, placed, shard_of
from gamma_po.errors import ConfigError
from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS
from gamma_po.studies.lm_outcome import candidates, judged, what_was_run
from gamma_po.studies.lm_plan import LanguageArm, LanguageStudy, plan, share_of
from gamma_po.studies.lm_study import collect
from gamma_po.studies.report import write_parquet, write_study
from tests.tiny import save_tiny_model, tiny_rows, write_rows

KL_MARGIN = {"class_path": "KL", "init_args": {"gamma0": 1.0, "tau": 0.5, "center": True}}
ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "dpo": {},
    "dpo, γ=0": {"set": {"model.margin": {"class_path": "Fixed", "init_args": {"gamma": 0.0}}}},
    "kl": {"set": {"model.margin": KL_MARGIN}, "against": ["dpo", "kl, matched slope"]},
    "kl, matched slope": {"matched_to": "kl", "against": ["dpo"]},
    "oracle": {"without_flipped": True, "against": ["dpo"]},
}
PAIRS, STEPS, BATCH = 16, 4, 4
SCORE_EQUATIONS = 1e-6  # mean residual of a logistic fit at its optimum, from float32 pulls


def write_inputs(root: Path) -> Path:
    """A model, data with gold rewards, the configuration of a run and of a study."""
    save_tiny_model(root / "model")
    for seed, (split, size) in enumerate({"train": PAIRS, "test": 12}.items()):
        rows = tiny_rows(size, seed=seed)
        write_rows(root / f"{split}.jsonl", [row | {"reward_chosen": 1.0, "reward_rejected": -1.0} for row in rows])
    fit = {
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1},
        "model": {
            "policy": {"path": str(root / "model")},
            "loss": {"class_path": "DPO", "init_args": {"beta": 0.1}},
            "margin": {"class_path": "NoMargin"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        },
        "data": {"train": str(root / "train.jsonl"), "test": str(root / "test.jsonl"), "batch_size": BATCH},
        "report": {"num_prompts": 2, "gold": "VaderSentiment", "sampling": {"max_new_tokens": 3}},
    }
    (root / "fit.yaml").write_text(yaml.safe_dump(fit))
    study = {"fit": str(root / "fit.yaml"), "noise": [0.3], "seeds": 2, "kls": [0.001], "arms": ARMS}
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False, allow_unicode=True))
    return root


def command(root: Path, *more: str) -> list[str]:
    return ["study", "lm", "--config", str(root / "study.yaml"), "--output", str(root / "out"), "--workers", "1", *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_inputs(tmp_path_factory.mktemp("lm"))
    with pytest.MonkeyPatch.context() as during:
        without_figures_of_runs(during)
        assert main(command(root, "--shard", "0/2")) == 0
        assert not (root / "out" / "runs.parquet").exists()
        assert main(command(root)) == 0
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_figures_of_runs(monkeypatch)


def without_figures_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of such a short run is the drawing of figures, which other tests look at."""
    for module in (plots, histograms):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: None)


def rows_of(root: Path) -> dict[tuple[str, int], dict]:
    return {(row["arm"], row["seed"]): row for row in pq.read_table(root / "out" / "runs.parquet").to_pylist()}


def pulls(folder: Path) -> list[dict]:
    return [row for file in sorted((folder / "pairs").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def texts_of(file: Path) -> list[str]:
    rows = map(json.loads, file.read_text().splitlines())
    return [row["prompt"] + row["chosen"] + row["rejected"] for row in rows]


def test_every_arm_and_seed_is_one_run_with_what_made_it(root: Path) -> None:
    rows = rows_of(root)
    assert set(rows) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    recorded = {
        "sample_kl",
        "sample_gold",
        "win_rate_kl0.001",
        "ref_acc",
        "gradient_on_flipped",
        "gamma_range",
        "commit",
    }
    assert all(recorded <= set(row) for row in rows.values())
    directories = [path for path in (root / "out" / "runs").glob("*/*") if path.is_dir()]
    assert len(directories) == len(rows)
    record = json.loads((root / "out" / "study.json").read_text())
    assert len(record["checks"]) == 2 and all(record["checks"].values())
    assert {"frontier.png", "gradient_weight.png", "tables.md"} <= {file.name for file in (root / "out").iterdir()}
    pairs = pq.read_table(root / "out" / "pairs.parquet").to_pylist()
    assert len(pairs) == len(rows) * STEPS * BATCH
    recorded = pulls(root / "out" / rows["kl", 1]["folder"])
    own = [row["target_margin"] for row in pairs if (row["arm"], row["seed"]) == ("kl", 1)]
    assert own == [row["target_margin"] for row in recorded]


def test_no_margin_and_a_margin_of_zero_train_the_same_weights(root: Path) -> None:
    rows = rows_of(root)
    for seed in (0, 1):
        one, other = (
            pq.read_table(root / "out" / rows[arm, seed]["folder"] / "test_pairs.parquet") for arm in list(ARMS)[:2]
        )
        assert one["logps_chosen"] == other["logps_chosen"] and one["logps_rejected"] == other["logps_rejected"]
    third = pq.read_table(root / "out" / rows["kl", 0]["folder"] / "test_pairs.parquet")
    first = pq.read_table(root / "out" / rows["dpo", 0]["folder"] / "test_pairs.parquet")
    assert third["logps_chosen"] != first["logps_chosen"]


def test_only_the_first_run_scores_the_reference(root: Path) -> None:
    scored = {}
    for log in (root / "out" / "runs").glob("*/log.txt"):
        counts = [int(number) for number in re.findall(r"read from the cache, (\d+)\s+scored", log.read_text())]
        assert len(counts) == 2  # train and test
        scored[log.parent.name] = counts
    assert sorted(scored.values())[-1] == [PAIRS, 12]
    assert sorted(scored.values())[:-1] == [[0, 0]] * (len(scored) - 1)


def test_the_oracle_trains_on_the_pairs_that_the_others_see_unflipped(root: Path) -> None:
    rows = rows_of(root)
    given = texts_of(root / "train.jsonl")
    kept_of = []
    for seed in (0, 1):
        flipped = {row["index"] for row in pulls(root / "out" / rows["dpo", seed]["folder"]) if row["flipped"]}
        assert 0 < len(flipped) < PAIRS
        (file,) = (root / "out" / "data").glob(f"oracle-*_seed-{seed}.jsonl")
        kept = texts_of(file)
        assert kept == [text for number, text in enumerate(given) if number not in flipped]
        assert rows["oracle", seed]["flipped"] == 0 and rows["oracle", seed]["steps"] == STEPS
        kept_of.append(kept)
    assert kept_of[0] != kept_of[1]  # a seed has flips of its own


def test_a_control_has_the_slope_of_the_run_it_is_fitted_to(root: Path) -> None:
    rows = rows_of(root)
    for seed in (0, 1):
        control = rows["kl, matched slope", seed]
        a, b = json.loads(control["margin"])["init_args"]["gamma"], control["beta"] / 0.1
        found = pulls(root / "out" / rows["kl", seed]["folder"])
        residual = [row["gradient_weight"] - 1 / (1 + math.exp(b * row["reward_margin"] - a)) for row in found]
        assert abs(sum(residual) / len(found)) < SCORE_EQUATIONS
        moment = sum(r * row["reward_margin"] for r, row in zip(residual, found, strict=True)) / len(found)
        assert abs(moment) < SCORE_EQUATIONS


def test_a_finished_study_is_not_run_again_and_a_lost_result_alone_is(
    root: Path, capsys: pytest.CaptureFixture
) -> None:
    results = {file.name: file.stat().st_mtime_ns for file in (root / "out" / "results").iterdir()}
    (lost,) = (name for name in results if name.startswith("dpo-g-0") and "seed-1" in name)
    before = json.loads((root / "out" / "results" / lost).read_text())
    (root / "out" / "results" / lost).unlink()
    assert main(command(root)) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (root / "out" / "results").iterdir()}
    assert {name for name in results if after[name] != results[name]} == {lost}
    again = json.loads((root / "out" / "results" / lost).read_text())
    changing = {"seconds", "folder", "commit"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }


def test_what_libraries_say_of_a_run_is_in_its_log_and_not_among_the_progress_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    library, handler = logging.getLogger("a_library"), logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    with (tmp_path / "log.txt").open("w") as file, messages_go_to(file):
        library.warning("during")
    library.warning("after")
    library.removeHandler(handler)
    assert capsys.readouterr().err == "after\n"
    assert (tmp_path / "log.txt").read_text() == "during\n"


def test_another_study_does_not_continue_in_the_same_folder(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(root, "--seeds", "3")) == 2
    assert "is of a study with other options" in capsys.readouterr().err


def test_runs_without_gold_rewards_or_samples_are_compared_by_what_they_have(root: Path, tmp_path: Path) -> None:
    def missing(name: str) -> bool:
        return name in ("win_rate", "kl", "gold") or "_kl0" in name

    shutil.copytree(root / "out" / "results", tmp_path / "results")
    (tmp_path / "runs").symlink_to(root / "out" / "runs")
    for file in (tmp_path / "results").iterdir():
        row = {name: value for name, value in json.loads(file.read_text()).items() if not missing(name)}
        row |= {name: math.nan for name in row if name.startswith("sample_") and name != "sample_prompts"}
        file.write_text(json.dumps(row | {"commit": "an earlier one"}))
    arms = {name: LanguageArm(**arm) for name, arm in ARMS.items()}
    study = LanguageStudy(fit=str(root / "fit.yaml"), arms=arms, noise=[0.3], seeds=2, gold_columns=[], kls=[])
    result = collect(study, plan(study, tmp_path), tmp_path)
    assert result.metrics == ("pair_accuracy",) and result.passed
    assert "kl" not in result.levels and "gamma_mean" in result.levels
    write_study(result, tmp_path / "tables", ["study"], 0.0)
    written = pq.read_table(tmp_path / "tables" / "runs.parquet")["commit"].to_pylist()
    assert written == ["an earlier one"] * len(written)
    tables = (tmp_path / "tables" / "tables.md").read_text()
    assert "conditional on these pairs and prompts" in tables and "runs made with an earlier one" in tables


def test_shares_of_the_runs_are_disjoint_and_complete(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = LanguageStudy(
        fit=str(root / "fit.yaml"), arms={name: LanguageArm(**arm) for name, arm in ARMS.items()}, seeds=3
    )
    units = plan(study, root)
    names = [run.name for unit in units for run in unit]
    assert len(set(names)) == len(names) == 3 * 3 * 5
    shared = [run.name for index in range(4) for unit in share_of(units, index, 4) for run in unit]
    assert sorted(shared) == sorted(names)
    for name, value in {"TASK_ID": "7", "TASK_MIN": "5", "TASK_MAX": "8", "TASK_COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert shard_of("slurm") == (2, 4) and shard_of("3/4") == (3, 4)
    with pytest.raises(ConfigError, match="shard='4/4' is not allowed"):
        share_of(units, *shard_of("4/4"))
    with pytest.raises(ConfigError, match="allowed: i/n"):
        shard_of("a/b")
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    with pytest.raises(ConfigError, match="needs the variables of a SLURM array"):
        shard_of("slurm")


def test_wrong_plans_are_answered_with_what_is_allowed(root: Path, tmp_path: Path) -> None:
    arms = {"dpo": LanguageArm()}
    with pytest.raises(ConfigError, match="max_steps"):
        plan(LanguageStudy(fit=str(root / "fit.yaml"), arms=arms, set={"trainer.max_steps": -1}), tmp_path)
    for options in ({"set": {"data": {"train": "x"}}}, {"arms": {"dpo": LanguageArm(set={"model": {}})}}):
        with pytest.raises(ConfigError, match="would replace the whole section"):
            LanguageStudy(**({"fit": str(root / "fit.yaml"), "arms": arms} | options))
    with pytest.raises(ConfigError, match="no such file"):
        plan(LanguageStudy(fit="nothing.yaml", arms=arms), tmp_path)
    with pytest.raises(ConfigError, match=r"arms\.dpo\.against='kl' is not allowed; allowed: dpo"):
        LanguageStudy(fit="f", arms={"dpo": LanguageArm(against=["kl"])})


def test_win_rates_among_the_references_answers_are_explicit_sums(tmp_path: Path) -> None:
    texts = {"p": {"x": (2.0, 0.3), "y": (1.0, -0.2), "z": (1.0, 0.9)}, "q": {"u": (0.0, 1.0), "v": (5.0, 0.0)}}
    pairs = [("p", "x", "y"), ("p", "x", "z"), ("q", "v", "u")]
    rows, scores = [], []
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        (gold_chosen, up), (gold_rejected, down) = texts[prompt][chosen], texts[prompt][rejected]
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "good": gold_chosen, "bad": gold_rejected}
        )
        reference = {"reference_logps_chosen": -3.0, "reference_logps_rejected": -4.0}
        scores.append({"index": number, "logps_chosen": up - 3.0, "logps_rejected": down - 4.0, **reference})
    data = write_rows(tmp_path / "test.jsonl", rows)
    write_parquet(scores, tmp_path / "test_pairs.parquet")
    row = judged(candidates(tmp_path, {"data": {"test": str(data)}}, ["good", "bad"]), [0.01])
    wins = kl = 0.0
    for answers in texts.values():
        total = sum(math.exp(f) for _, f in answers.values())
        for gold, f in answers.values():
            share = math.exp(f) / total
            kl += share * math.log(share * len(answers)) / len(texts)
            beaten = sum((gold > other) + 0.5 * (gold == other) for other, _ in answers.values()) / len(answers)
            wins += share * beaten / len(texts)
    assert row["win_rate"] == pytest.approx(wins, abs=1e-7) and row["kl"] == pytest.approx(kl, abs=1e-7)
    assert torch.isfinite(torch.tensor(row["win_rate_kl0.01"]))


def test_a_calibration_reports_every_strength_and_keeps_to_the_rule(root: Path, capsys: pytest.CaptureFixture) -> None:
    config = yaml.safe_load((root / "fit.yaml").read_text())
    config["model"]["margin"] = {"class_path": "Map"}
    (root / "map.yaml").write_text(yaml.safe_dump(config))
    options = ["--fit", str(root / "map.yaml"), "--pairs", str(root / "test.jsonl"), "--strengths", "[0,2]"]
    folder = root / "calibration"
    assert main(["study", "calibrate", *options, "--output", str(folder), "--workers", "1"]) == 0
    found = json.loads((folder / "calibration.json").read_text())
    assert found["strengths"] == [0, 2] and found["gain"][0] == 0
    assert found["strength"] == (2 if found["gain"][1] > 2 * found["error"][1] else 0)
    printed = capsys.readouterr()
    assert f"--model.margin.init_args.strength {found['strength']:g}" in printed.out
    files = [(root / f"{split}.jsonl").read_text().splitlines() for split in ("test", "train")]
    prompts = [{json.loads(line)["prompt"] for line in lines} for lines in files]
    shared = len(prompts[0] & prompts[1])
    assert (f"{shared} of the {len(prompts[0])} held-out prompts are training" in printed.err) == (shared > 0)
    wrong = ["study", "calibrate", "--fit", str(root / "fit.yaml"), "--pairs", "x", "--output", str(root / "no")]
    assert main(wrong) == 2
    assert "allowed: Map" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_reads_the_folder_of_any_study(root: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "04_lm_ablation.ipynb", as_version=4)
    line = 'FOLDER = Path("experiments/studies/sentiment")'
    changed = [cell for cell in notebook.cells if line in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace(line, f'FOLDER = Path("{root / "out"}")')
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert f"{2 * len(ARMS)} runs: {', '.join(ARMS)}" in printed and str(root / "train.jsonl") in printed


@pytest.mark.parametrize("name", ["sentiment", "sentiment_gpu", "alpacaeval_lm"])
def test_the_shipped_studies_are_lists_of_runs_that_fit_understands(
    name: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", f"experiments/studies/{name}.yaml", "--output", str(tmp_path / "out")]
    units = plan(parse(LanguageOptions, words, "study lm"), tmp_path / "out")
    first = {unit[0].arm: unit[0] for unit in reversed(units)}
    methods = {json.dumps(run.config["model"], sort_keys=True): run for run in first.values()}
    assert len(methods) >= 6
    for run in methods.values():  # the rest of their options is the same
        loss, margin = (built(run.config["model"][part]) for part in ("loss", "margin"))
        assert margin.bind(loss) is not None
    run = list(methods.values())[-1]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(placed(run.config, run, tmp_path), allow_unicode=True))
    with pytest.raises(SystemExit) as stop:
        PreferenceCLI(["fit", "--config", str(file), "--model.policy.path", tiny_model_path, "--print_config"])
    assert stop.value.code == 0
    assert {run.follows.arm for unit in units for run in unit[1:] if run.follows} <= set(first)


def built(config: dict) -> object:
    """A loss or margin from its configuration."""
    known = {kind.__name__: kind for kind in (*LOSSES.values(), *MARGINS.values())}
    options = {key: built(value) if key == "inner" else value for key, value in config.get("init_args", {}).items()}
    return known[config["class_path"]](**options)


def test_the_strength_of_a_margin_is_read_from_every_way_to_state_it(root: Path) -> None:
    ways = {
        "kl": {"class_path": "KL", "init_args": {"gamma0": 3.0, "tau": 2.0}},
        "in reverse": {"class_path": "Reverse", "init_args": {"inner": KL_MARGIN}},
        "ratio": {"class_path": "KL", "init_args": {"gamma0": {"gamma_beta_ratio": 20.0}, "tau": 0.5}},
        "by default": {"class_path": "KL"},
    }
    arms = {name: LanguageArm(set={"model.margin": margin}) for name, margin in ways.items()}
    units = plan(LanguageStudy(fit=str(root / "fit.yaml"), arms=arms, noise=[0.0], seeds=1), root)
    found = {run.arm: what_was_run(run)["gamma0_over_tau"] for (run,) in units}
    assert found == {"kl": 1.5, "in reverse": 2.0, "ratio": 4.0, "by default": None}  # β is 0.1

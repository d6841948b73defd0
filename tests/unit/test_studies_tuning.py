"""Tuned studies on a language model, with runs that are numbers: grids, choices, continuation, what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gamma_po.__main__ import main
from gamma_po.commands import study_lm, study_tune
from gamma_po.commands.arguments import parse
from gamma_po.commands.study_lm import INTERRUPTED, LanguageOptions
from gamma_po.errors import ConfigError, DataError
from gamma_po.files import write_text
from gamma_po.studies.lm_folder import check_same_study
from gamma_po.studies.lm_plan import PlannedRun, option, plan
from gamma_po.studies.lm_study import result_file
from gamma_po.studies.lm_tuning import TunedArm, TunedStudy, add_scores, best_of, evaluation_study, extended
from gamma_po.studies.methods import at_edges
from gamma_po.studies.study import Study
from tests.tiny import tiny_rows, write_rows

BETA, RATE = "model.loss.init_args.beta", "model.optimizer.init_args.lr"
GRID = {BETA: [0.1, 0.4], RATE: [0.001, 0.004]}
KL = {"model.margin": {"class_path": "KL", "init_args": {"gamma0": 1.0, "tau": 0.5}}}
SHUFFLED = {"model.margin": {"class_path": "Shuffled", "init_args": {"inner": KL["model.margin"]}}}
ARMS: dict[str, dict[str, Any]] = {
    "dpo": {"grid": GRID},
    "kl": {"set": KL, "grid": GRID, "against": ["dpo"]},
    "kl, matched slope": {"matched_to": "kl", "against": ["dpo"]},
    "kl shuffled": {"set": SHUFFLED, "tuned_as": "kl", "against": ["dpo"]},
    "oracle": {"without_flipped": True, "tuned_as": "dpo", "against": ["dpo"]},
}
METRIC = "win_rate_kl0.1"
ROUNDING = 1e-12
# By hand: the optimum (1.6, 0.001) is beyond the corner (0.4, 0.001) of the grid, where both options lie on an edge.
FIRST = {(0.1, 0.001), (0.1, 0.004), (0.4, 0.001), (0.4, 0.004)}
SECOND = {(1.6, 0.001), (1.6, 0.004), (0.1, 0.00025), (0.4, 0.00025)}
THIRD = {(6.4, 0.001), (6.4, 0.004), (1.6, 0.00025)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test", "other"):
        write_rows(tmp_path / f"{split}.jsonl", tiny_rows(6, seed=len(split)))
    fit = {
        "trainer": {"max_steps": 4},
        "model": {
            "loss": {"class_path": "DPO", "init_args": {"beta": 0.2}},
            "margin": {"class_path": "NoMargin"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        },
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit))
    return tmp_path


def study_of(root: Path, **options: Any) -> TunedStudy:
    arms = {name: TunedArm(**arm) for name, arm in (options.pop("arms", None) or ARMS).items()}
    return TunedStudy(fit=str(root / "fit.yaml"), arms=arms, **({"noise": [0.4], "seeds": 3, "kls": [0.1]} | options))


def command(root: Path, *more: str, **options: Any) -> list[str]:
    """The command line of a study in `root`."""
    given = {"fit": str(root / "fit.yaml"), "arms": ARMS, "noise": [0.4], "seeds": 3, "kls": [0.1]} | options
    given["tuning_set"] = {"data.test": str(root / "other.jsonl")}
    (root / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    words = ["study", "tune", "--config", str(root / "study.yaml"), "--output", str(root / "out"), "--workers", "1"]
    return [*words, *more]


class Runs:
    """Stands in for the runs: the win rate is highest at β 1.6 and lr 0.001, more or less by seed."""

    def __init__(self) -> None:
        self.made: list[PlannedRun] = []
        self.stop_after = math.inf

    def run_one(self, study: Any, run: PlannedRun, folder: Path) -> str | None:
        if len(self.made) >= self.stop_after:
            return "interrupted"
        self.made.append(run)
        beta, rate = option(run.config, BETA), option(run.config, RATE)
        away = math.log(beta / 1.6) ** 2 + math.log(rate / 0.001) ** 2
        score = 0.6 - 0.01 * away + (0.05 if run.seed % 2 else -0.05)
        write_text(result_file(folder, run), json.dumps({"arm": run.arm, "seed": run.seed, METRIC: score}))
        return None

    def of(self, stage: str) -> list[PlannedRun]:
        return [run for run in self.made if (run.seed >= 1_000_000) == (stage == "tuning")]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(study_lm, "run_one", found.run_one)
    result = Study(title="", config={"arms": {}}, metrics=(), rows=[], pairings=[])
    monkeypatch.setattr(study_tune, "collect", lambda study, units, folder: result)
    monkeypatch.setattr(study_tune, "compared", lambda result, folder, arguments, start: 0)
    return found


def tried_by(runs: Runs, name: str) -> list[tuple[float, float]]:
    """β and lr of an arm's tuning runs, once per seed, in their order."""
    own = [run for run in runs.of("tuning") if run.arm.startswith(f"{name}: ") and run.seed % 2]
    return [(option(run.config, BETA), option(run.config, RATE)) for run in own]


def test_a_grid_is_all_its_combinations_with_names_as_short_as_they_differ() -> None:
    arm = TunedArm(grid=GRID)
    assert set(arm.configurations()) == FIRST and len(arm.configurations()) == 4
    assert arm.label((0.1, 0.001)) == "beta 0.1, lr 0.001"
    assert arm.options((0.1, 0.001)) == {BETA: 0.1, RATE: 0.001}
    alike = TunedArm(grid={"model.a.tau": [1, 2], "model.b.tau": [3, 4]})
    assert alike.label((1, 4)) == "model.a.tau 1, model.b.tau 4"


def test_the_choice_is_by_the_mean_over_seeds_and_a_seed_without_a_value_rules_out() -> None:
    configs = {"a": (0.1, 0.001), "b": (0.4, 0.001), "c": (0.1, 0.004)}
    rows = [
        {"arm": "a", "m": 0.70}, {"arm": "b", "m": 0.58}, {"arm": "c", "m": 0.9},
        {"arm": "a", "m": 0.40}, {"arm": "b", "m": 0.56}, {"arm": "c", "m": math.nan},
    ]  # fmt: skip
    tried: dict[str, dict] = {}
    add_scores(tried, rows, {label: ("kl", config) for label, config in configs.items()}, "m")
    expected = {configs["a"]: 0.55, configs["b"]: 0.57, configs["c"]: -math.inf}
    assert tried["kl"] == pytest.approx(expected, abs=ROUNDING)
    assert best_of("kl", tried["kl"]) == configs["b"]
    with pytest.raises(DataError, match="kl: no configuration reaches the KL"):
        best_of("kl", {configs["a"]: -math.inf})


def test_a_grid_grows_by_its_own_steps_around_the_best_and_the_edge_is_named(root: Path) -> None:
    study = study_of(root)
    tried = {"dpo": {config: float(config == (0.4, 0.001)) for config in FIRST}}
    assert set(extended(study, tried)["dpo"]) == SECOND
    tried["dpo"] |= {config: 2.0 * (config == (1.6, 0.001)) for config in SECOND}
    assert set(extended(study, tried)["dpo"]) == THIRD
    assert at_edges(study.arms["dpo"], (1.6, 0.001), set(tried["dpo"])) == ["beta=1.6"]
    inner = {(b, r): float((b, r) == (0.4, 2.0)) for b in (0.1, 0.4, 1.6) for r in (1.0, 2.0, 4.0)}
    arms = {"dpo": {"grid": {BETA: [0.1, 0.4, 1.6], RATE: [1.0, 2.0, 4.0]}}}
    assert extended(study_of(root, arms=arms), {"dpo": inner}) == {}


def test_a_single_option_is_extended_alone_whole_numbers_stay_whole_and_limits_are_kept(root: Path) -> None:
    def grown(key: str, values: list, best: float) -> list:
        study = study_of(root, arms={"dpo": {"grid": {key: values}}})
        return extended(study, {"dpo": {(value,): float(value == best) for value in values}}).get("dpo", [])

    assert grown(RATE, [0.1, 0.3], 0.3) == [(0.9,)]
    (rank,) = grown("model.lora.r", [8, 16], 16)
    assert rank == (32,) and isinstance(rank[0], int)
    assert grown("model.loss.init_args.label_smoothing", [0.1, 0.3], 0.3) == []


def test_tuning_tries_the_grid_extends_it_and_compares_what_was_best_on_other_seeds(
    root: Path, runs: Runs, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(root, "--tuning_seeds", "2", "--extensions", "1")) == 0
    for name in ("dpo", "kl"):
        tried = tried_by(runs, name)
        assert set(tried[:4]) == FIRST and set(tried[4:]) == SECOND and len(tried) == 8
    assert len(runs.of("tuning")) == 2 * 8 * 2 and len(runs.of("evaluation")) == 3 * len(ARMS)
    assert {run.seed for run in runs.of("tuning")} == {1_000_000, 1_000_001}
    assert {run.seed for run in runs.of("evaluation")} == {0, 1, 2}
    for run in runs.of("evaluation"):
        assert (option(run.config, BETA), option(run.config, RATE)) == (1.6, 0.001), run.arm  # the control's, too
        assert option(run.config, "data.test") == str(root / "test.jsonl")
        assert option(run.config, "model.margin.class_path") == {"dpo": "NoMargin", "oracle": "NoMargin", "kl": "KL",
            "kl, matched slope": "KL", "kl shuffled": "Shuffled"}[run.arm]  # fmt: skip
    assert {option(run.config, "data.test") for run in runs.of("tuning")} == {str(root / "other.jsonl")}
    assert {option(run.config, "data.cache_dir") for run in runs.made} == {str(root / "out" / "cache")}
    table = pq.read_table(root / "out" / "noise-0.4" / "tuning.parquet").to_pylist()
    (best,) = (row for row in table if row["arm"] == "kl" and row["chosen"])
    assert best["configuration"] == "beta 1.6, lr 0.001" and best["at_edge"] == "beta=1.6"
    assert best[METRIC] == pytest.approx(0.6, abs=ROUNDING)
    assert len(table) == 16 and "beta=1.6" in capsys.readouterr().out


def test_the_chosen_study_is_one_that_study_lm_reads_and_continues(root: Path, runs: Runs) -> None:
    assert main(command(root)) == 0
    folder = root / "out" / "noise-0.4"
    words = ["--config", str(folder / "tuned.yaml"), "--output", str(folder / "evaluation")]
    study = parse(LanguageOptions, words, "study lm")
    units = plan(study, folder / "evaluation")
    names = [run.name for unit in units for run in unit]
    assert sorted(names) == sorted(run.name for run in runs.of("evaluation"))
    assert all(result_file(folder / "evaluation", run).is_file() for unit in units for run in unit)
    given = {name: getattr(study, name) for name in ("fit", "arms", "noise", "seeds", "set", "kls")}
    check_same_study(study_lm.LanguageStudy(**given), units, folder / "evaluation", "cpu")


@pytest.mark.parametrize("stop_after", [3, 18, 40])  # in the grid, in its extension, in the comparison
def test_after_an_interruption_nothing_is_run_twice_and_nothing_is_left_out(
    root: Path, runs: Runs, stop_after: int
) -> None:
    runs.stop_after = stop_after
    assert main(command(root)) == INTERRUPTED
    assert len(runs.made) == stop_after
    runs.stop_after = math.inf
    assert main(command(root)) == 0
    names = [run.name for run in runs.made]
    assert len(names) == len(set(names)) == 2 * 8 * 2 + 3 * len(ARMS)
    assert main(command(root)) == 0
    assert len(runs.made) == len(names)
    assert main(command(root, "--extensions", "2")) == 2  # another study


def test_shares_wait_for_each_other_before_a_grid_is_extended(
    root: Path, runs: Runs, capsys: pytest.CaptureFixture
) -> None:
    counts = []
    for shard in ("0/2", "1/2", "0/2", "1/2"):
        assert main(command(root, "--shard", shard)) == 0
        counts.append(len(runs.made))
    # half a grid; the other half and a half of what extends it; the rest and a half of the comparison; the rest
    assert counts == [8, 16 + 8, 32 + 6, 32 + 15]
    assert "give no shard to compare" in capsys.readouterr().out
    assert main(command(root)) == 0
    assert len(runs.made) == counts[-1]


def test_arms_are_tuned_at_each_flip_rate_where_they_and_what_they_follow_are(root: Path, runs: Runs) -> None:
    arms = ARMS | {"oracle": ARMS["oracle"] | {"noise": [0.4]}, "kl": ARMS["kl"] | {"noise": [0.0]}}
    assert main(command(root, arms=arms, noise=[0.0, 0.4], seeds=2)) == 0
    found = {rate: {run.arm for run in runs.of("evaluation") if run.flip_rate == rate} for rate in (0.0, 0.4)}
    assert found == {0.0: {"dpo", "kl", "kl, matched slope", "kl shuffled"}, 0.4: {"dpo", "oracle"}}
    assert {run.arm.partition(":")[0] for run in runs.of("tuning") if run.flip_rate == 0.4} == {"dpo"}
    assert len(pq.read_table(root / "out" / "noise-0" / "tuning.parquet")) == 16


def changed(name: str, **options: Any) -> dict[str, dict[str, Any]]:
    """The arms, one of them changed."""
    return ARMS | {name: ARMS[name] | options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": changed("kl", grid={BETA: 0.1, RATE: [1, 2, 3, 4]})}, rf"arms\.kl\.grid: {BETA}=0\.1 .* a list"),
        ({"arms": changed("kl", grid={BETA: []})}, r"beta=\[\] is not allowed; allowed: a list of two or more"),
        ({"arms": changed("kl", grid={BETA: [0.1]})}, r"beta=\[0\.1\] is not allowed"),
        ({"arms": changed("kl", grid={BETA: [0.4, 0.1]})}, "increasing"),
        ({"arms": changed("kl", grid={BETA: [0.1, 0.1]})}, "increasing"),
        ({"arms": changed("kl", grid={BETA: [0, 0.1]})}, "numbers > 0"),
        ({"arms": changed("kl", grid={BETA: ["a", "b"]})}, "numbers > 0"),
        ({"arms": changed("kl", grid={BETA: [True, 2]})}, "numbers > 0"),
        ({"arms": changed("kl", grid={})}, r"arms\.kl=.* exactly one of grid, tuned_as and matched_to, not empty"),
        ({"arms": changed("kl", tuned_as="dpo")}, "exactly one of"),
        ({"arms": changed("kl, matched slope", grid=GRID)}, "exactly one of"),
        ({"arms": changed("kl shuffled", tuned_as="kll")}, r"kl shuffled\.tuned_as='kll' .* allowed: dpo, kl$"),
        ({"arms": changed("kl", grid=GRID | {RATE: [1, 2, 3]})}, r"\{'dpo': 4, 'kl': 6\} .* as many for every arm"),
        ({"arms": changed("kl", grid={"model": [1, 2, 3, 4]})}, "would replace the whole section"),
        ({"arms": changed("dpo", noise=[0.0])}, r"arms\.dpo\.noise=\[0\.0\] .* every flip rate"),
        ({"tuning_set": {"data": {"test": "x"}}}, "tuning_set=.*would replace the whole section"),
        ({"tuning_seeds": 0}, "tuning_seeds=0"),
        ({"extensions": -1}, "extensions=-1"),
        ({"seeds": 1_000_001}, "where tuning seeds start"),
        ({"gold_columns": [], "kls": []}, "gold_columns=.*tuned by their win rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_with_what_is_allowed(root: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_of(root, **options)


def refusal_of(root: Path, capsys: pytest.CaptureFixture, **options: Any) -> str:
    assert main(command(root, **options)) == 2
    return capsys.readouterr().err


def test_an_option_that_its_arm_does_not_state_is_refused_before_anything_runs(
    root: Path, runs: Runs, capsys: pytest.CaptureFixture
) -> None:
    misspelt = {"model.loss.init_args.bta": [0.1, 0.4], RATE: [0.001, 0.004]}
    said = refusal_of(root, capsys, arms=changed("kl", grid=misspelt))
    assert re.search(r"arms\.kl: tuned option='model\.loss\.init_args\.bta' is not allowed; allowed: an option", said)
    inner = {"model.margin.init_args.gamma0": [1, 2], RATE: [0.001, 0.004]}  # not where a shuffled margin has it
    said = refusal_of(root, capsys, arms=changed("kl", grid=inner))
    assert "arms.kl shuffled: tuned option='model.margin.init_args.gamma0'" in said
    said = refusal_of(root, capsys, arms=changed("kl", grid={BETA: 3}))
    assert said.startswith("error: arms.kl.grid") and "Traceback" not in said
    assert runs.made == []


def test_an_arm_whose_choice_is_open_has_its_own_options(root: Path) -> None:
    study = study_of(root, arms=changed("kl", against=["dpo", "oracle"]), only=["dpo", "kl"])
    found = evaluation_study(study, 0.4, {"kl": (0.4, 0.001)})
    assert found.arms["dpo"].set == {}
    assert found.arms["kl"].set == KL | {BETA: 0.4, RATE: 0.001} and found.arms["kl"].against == ["dpo"]

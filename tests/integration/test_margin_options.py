"""Parts of margins on the command line and in YAML: they run, their record runs again, and a checkpoint resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from gamma_po.cli import run as run_command
from gamma_po.losses import SimPO
from gamma_po.margins import KL, Dual, GammaBetaRatio, RecentPool
from gamma_po.module import PreferenceModule
from gamma_po.policies import ModelConfig
from tests.integration.test_resume import assert_same_ending, checkpoint_at, last_state
from tests.runs import arguments, fit, run, steps_of
from tests.tiny import tiny_rows, write_rows

EVERY_PAIR = ["--pair_recorder.every_n_steps", "1", "--checkpoint.save_top_k", "-1"]
MARGINS = {
    "dual": {"class_path": "KL", "init_args": {"solver": {"class_path": "Dual", "init_args": {"window": 9}}}},
    "sampled": {
        "class_path": "KL",
        "init_args": {
            "tau": 2.0,
            "solver": {"class_path": "MirrorDescent", "init_args": {"steps": 9}},
            "pool": {"class_path": "SampledPool", "init_args": {"sample": 3, "memory": 9}},
        },
    },
    "ratio": {"class_path": "KL", "init_args": {"gamma0": {"gamma_beta_ratio": 4.0}, "tau": 0.5}},
    "reverse of a step": {
        "class_path": "Reverse",
        "init_args": {"history": 7, "inner": {"class_path": "AlphaDPO", "init_args": {"gamma0": 0.5}}},
    },
}


def yaml_file(folder: Path, margin: dict[str, Any]) -> list[str]:
    """The option that reads a margin from a file."""
    path = folder / "margin.yaml"
    path.write_text(yaml.safe_dump({"model": {"margin": margin}}))
    return ["--config", str(path)]


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_of_parts_is_read_from_the_runs_record_and_resumes_to_the_same_bits(
    name: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    margin = yaml_file(tmp_path, MARGINS[name])
    whole = fit(tiny_model_path, tiny_data, tmp_path, [*margin, *EVERY_PAIR, "--checkpoint.every_n_train_steps", "4"])
    checkpoint = ["--ckpt_path", str(checkpoint_at(whole, 4))]
    resumed = fit(tiny_model_path, tiny_data, tmp_path, checkpoint, config=whole / "config.yaml")
    assert_same_ending(whole, resumed, 4)


def test_parts_on_the_command_line_are_those_of_the_file(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    given = ["--model.margin", "KL", "--model.margin.tau", "2.0", "--model.margin.solver", "MirrorDescent"]
    given += ["--model.margin.solver.steps", "9", "--model.margin.pool", "SampledPool"]
    given += ["--model.margin.pool.sample", "3", "--model.margin.pool.memory", "9"]
    words = fit(tiny_model_path, tiny_data, tmp_path, given)
    file = fit(tiny_model_path, tiny_data, tmp_path, yaml_file(tmp_path, MARGINS["sampled"]))
    assert steps_of(words, "train/loss") == steps_of(file, "train/loss")
    assert last_state(words)["margin_state"]["reward_margin"].shape == (9,)


def test_a_margin_over_beta_on_the_command_line_is_the_margin_times_the_losss_beta(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    simpo = ["--model.loss", "SimPO", "--model.loss.beta", "2.5", "--model.margin", "Fixed"]
    ratio = run("fit", tiny_model_path, tiny_data, tmp_path, [*simpo, "--model.margin.gamma.gamma_beta_ratio", "0.4"])
    plain = fit(tiny_model_path, tiny_data, tmp_path, [*simpo, "--model.margin.gamma", "1.0"])
    assert ratio.cli.model.margin.gamma == 1.0
    assert steps_of(ratio.trainer_dir, "train/loss") == steps_of(plain, "train/loss")


def test_reverse_of_a_column_reads_the_column(tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "gap": 1.0 + k} for k, row in enumerate(tiny_rows(32))]
    data = tiny_data | {"train": str(write_rows(tmp_path / "gaps.jsonl", rows)), "validation": "null", "test": "null"}
    options = ["--data.columns.margin", "gap", "--data.batch_size", "1", *EVERY_PAIR]
    options += ["--model.margin", "Reverse", "--model.margin.inner", "Column"]
    folder = fit(tiny_model_path, data, tmp_path, options)
    given = last_state(folder)["margin_state"]["target_margin"].tolist()
    files = sorted((folder / "pairs").glob("step-*.parquet"))
    received = [value for file in files for value in pq.read_table(file)["target_margin"].to_pylist()]
    assert sorted(given) == [1.0 + k for k in range(32)]
    for step in range(32):  # one pair a step: the rank of its own γ from the other end, among those before
        pool = sorted(given[: step + 1])
        assert received[step] == pytest.approx(pool[-1 - pool.index(given[step])])


def test_a_module_built_by_hand_has_its_parts_in_its_checkpoints_plain(tiny_model_path: str) -> None:
    margin = KL(gamma0=GammaBetaRatio(gamma_beta_ratio=0.4), tau=0.5, solver=Dual(window=3))
    module = PreferenceModule(ModelConfig(path=tiny_model_path), SimPO(beta=2.5), margin)
    assert module.margin.gamma0 == 1.0 and module.margin.center is False
    plain = module.hparams["margin"]["init_args"]
    assert plain["gamma0"] == {"gamma_beta_ratio": 0.4}
    assert plain["solver"] == {"class_path": "gamma_po.margins.allocation.Dual", "init_args": {"window": 3}}
    pooled = PreferenceModule(ModelConfig(path=tiny_model_path), SimPO(), KL(pool=RecentPool(history=3)))
    assert pooled.hparams["margin"]["init_args"]["pool"]["init_args"] == {"history": 3}


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown solver": (["--model.margin.solver", "Newton"], ["KL.solver", "'Newton'", "Exact, MirrorDescent, Dual"]),
    "unknown pool": (["--model.margin.pool", "All"], ["KL.pool", "All", "RecentPool, SampledPool"]),
    "a pool that the price has not": (
        ["--model.margin.solver", "Dual", "--model.margin.history", "9"],
        ["kl.history=9 is not allowed", "nothing with kl.solver=Dual(window=512), which has no pool"],
    ),
    "two pools": (
        ["--model.margin.pool", "SampledPool", "--model.margin.history", "9"],
        ["kl.history=9 is not allowed", "nothing beside kl.pool=SampledPool"],
    ),
    "an option of another solver": (
        ["--model.margin.solver", "Dual", "--model.margin.solver.steps", "9"],
        ["Dual does not use the option 'steps'", "allowed: window"],
    ),
    "a ratio to a beta that changes": (
        ["--model.loss", "BetaDPO", "--model.margin.gamma0.gamma_beta_ratio", "0.4"],
        ["kl.gamma0=GammaBetaRatio(gamma_beta_ratio=0.4)", "'beta_dpo', which has another beta at every step"],
    ),
    "a ratio carried to another margin": (
        ["--model.margin.gamma0.gamma_beta_ratio", "0.4", "--model.margin", "KLDual"],
        ["model.margin changes from KL to KLDual", "gamma0.gamma_beta_ratio=0.4", "(default of KLDual: 1.0)"],
    ),
    "a reversed reversal": (
        ["--model.margin", "Reverse", "--model.margin.inner", "Shuffled"],
        ["reverse.inner='shuffled' is not allowed", "any but reverse and shuffled"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_are_refused_with_what_is_allowed(
    case: str, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = REFUSED[case]
    try:
        status = run_command(["fit", *arguments(tiny_model_path, tiny_data, tmp_path, options)])
    except SystemExit as end:  # the parser's own errors
        status = end.code
    message = capsys.readouterr().err
    assert status == 2 and all(part in message for part in expected), message

"""On two processes a stopped run continues bit for bit, with dropout, batches by tokens, workers and accumulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.test_sharding import ONE_FILE, SCRIPT, STRATEGY
from tests.processes import two_processes
from tests.runs import arguments, fit, steps_of
from tests.same import assert_goes_on_with_the_same_bits, pairs_by_step
from tests.tiny import tiny_rows, write_rows

COMMON = [
    "--trainer.max_epochs",
    "2",
    "--trainer.devices",
    "2",
    "--data.batch_size",
    "2",
    "--data.eval_batch_size",
    "1",
]
COMMON += ["--model.lora.r", "4", "--model.lora.dropout", "0.1", "--data.length_window", "1"]
COMMON += ["--trainer.accumulate_grad_batches", "2", "--pair_recorder.every_n_steps", "1"]
COMMON += ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
DDP = [STRATEGY, "ddp", "--data.max_tokens_per_forward", "250"]
FSDP2 = [STRATEGY, "ModelParallelStrategy", f"{STRATEGY}.data_parallel_size", "2"]
FSDP2 += [f"{STRATEGY}.tensor_parallel_size", "1"]
WORKERS = ["--data.num_workers", "1"]
# Four steps in an epoch. Name -> options, the step to go on from, options that loading needs.
CASES = {
    "ddp, inside the first epoch": ([*DDP], 3, []),
    "fsdp2, shards, between the epochs": ([*FSDP2, *WORKERS], 4, ["--weights_only", "false"]),
    "fsdp2, one file, inside the second": ([*FSDP2, *ONE_FILE], 6, []),
}


@pytest.fixture(scope="module")
def runs(tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name to directory of each case's run and, with `-resumed`, of the run that went on from a checkpoint of it."""
    root = tmp_path_factory.mktemp("resume")
    rows = tiny_rows(32)
    for row in rows[::5]:
        row["chosen"] += " and good" * 12
    data = {**tiny_data, "train": str(write_rows(root / "uneven.jsonl", rows))}
    commands = {}
    for i, (options, step, loading) in enumerate(CASES.values()):
        given = [*COMMON, *options]
        start = f"glob:{root}/{i}/runs/run/*/checkpoints/*step={step}.ckpt"
        commands[f"{i}"] = ["fit", *arguments(tiny_model_path, data, root / f"{i}", given)]
        given += ["--ckpt_path", start, *loading]
        commands[f"{i}-resumed"] = ["fit", *arguments(tiny_model_path, data, root / f"{i}-resumed", given)]
    (root / "commands.json").write_text(json.dumps(commands))
    (root / "script.py").write_text(SCRIPT)
    two_processes(
        [str(root / "script.py"), str(root / "commands.json")], ROOT=str(root), XDG_CACHE_HOME=str(root / "cache")
    )
    return {name: next((root / name / "runs" / "run").iterdir()) for name in commands}


@pytest.mark.parametrize("case", range(len(CASES)), ids=list(CASES))
def test_a_run_on_two_processes_resumes_with_the_same_bits(case: int, runs: dict[str, Path]) -> None:
    _, step, _ = list(CASES.values())[case]
    whole, resumed = runs[f"{case}"], runs[f"{case}-resumed"]
    assert len(steps_of(whole, "train/loss")) == 8
    assert len({len(rows) for rows in pairs_by_step(whole).values()}) > 1  # micro-batches are cut by tokens
    assert_goes_on_with_the_same_bits(whole, resumed, behind=step)


def test_what_is_logged_of_a_step_is_the_mean_over_its_pairs_whatever_process_and_micro_batch_they_are_in(
    runs: dict[str, Path], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Before the first step, where adapters change nothing: against one batch of the same eight pairs."""
    data = {**tiny_data, "train": str(runs["0"].parents[3] / "uneven.jsonl")}
    options = ["--data.batch_size", "8", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    one = fit(tiny_model_path, data, tmp_path, options)
    for name in ("train/loss", "train/logps/chosen", "train/logps/rejected"):
        assert steps_of(runs["0"], name)[0] == pytest.approx(steps_of(one, name)[0], rel=1e-5)

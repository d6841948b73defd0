"""Two processes do what one does: same losses, weights, metrics and margin history from the same global batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from gamma_po.ranks import Local, current_ranks
from gamma_po.state import state_to_plain
from tests.processes import torchrun, two_processes
from tests.runs import arguments, run, steps_of
from tests.same import (
    LOSS_TOLERANCE,
    METRICS,
    WEIGHT_TOLERANCE,
    assert_same_history,
    assert_same_pairs,
    assert_same_validation,
)

OBJECTIVE = ["--model.loss.beta", "0.3", "--model.margin.tau", "0.5", "--model.margin.history", "20"]
# Adam turns rounding differences of vanishing gradients into whole steps; SGD does not.
OBJECTIVE += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]


class EveryRanksState(Callback):
    """Writes each rank's margin state and run directory at the end of training; named on the command line."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = {"margin_state": state_to_plain(pl_module.margin_state), "folder": str(trainer.log_dir)}
        torch.save(state, Path(os.environ["RANK_STATES"]) / f"rank{trainer.global_rank}.pt")


def flat_weights(folder: Path) -> torch.Tensor:
    """All trained weights of the last checkpoint in one vector."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


@pytest.fixture(scope="module")
def both(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path, str]:
    """The directories of a one-process and a two-process run with the same global batch; rank states; messages."""
    root = tmp_path_factory.mktemp("ranks")
    options = ["--trainer.max_epochs", "3", "--pair_recorder.every_n_steps", "1", "--report.enabled", "true"]
    options += OBJECTIVE
    # 11 rows, two at a time: the second process's last batch is empty. A margin's pool is a step of all ranks.
    options += ["--report.num_prompts", "2", "--data.eval_batch_size", "2", "--data.validation", tiny_data["test"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache-one"))
        patch.setattr("sys.argv", ["gamma_po"])
        one = run("fit", tiny_model_path, tiny_data, root / "one", options).trainer_dir
    halved = [*options, "--data.batch_size", "2", "--data.eval_batch_size", "1"]
    halved += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    halved += ["--trainer.callbacks", "tests.integration.test_ranks.EveryRanksState"]
    said = torchrun(
        ["-m", "gamma_po", "fit", *arguments(tiny_model_path, tiny_data, root / "two", halved)],
        XDG_CACHE_HOME=str(root / "cache-two"), RANK_STATES=str(root),
    )  # fmt: skip
    (two,) = (root / "two" / "runs" / "run").iterdir()  # one folder, whatever the number of processes
    return one, two, root, said


def test_two_processes_see_the_pairs_losses_and_margins_of_one(both: tuple[Path, Path, Path, str]) -> None:
    assert_same_pairs(both[0], both[1], steps=24)


def test_the_logged_training_metrics_are_means_over_all_processes(both: tuple[Path, Path, Path, str]) -> None:
    for column in ("train/loss", "train/rewards/margins", "train/grad_norm", "train/gamma/mean"):
        expected = steps_of(both[0], column)
        assert expected and steps_of(both[1], column) == pytest.approx(expected, abs=LOSS_TOLERANCE)


def test_two_processes_end_with_the_weights_of_one(both: tuple[Path, Path, Path, str]) -> None:
    one, two = flat_weights(both[0]), flat_weights(both[1])
    assert float((one - two).norm() / one.norm()) < WEIGHT_TOLERANCE


def test_validation_of_an_uneven_number_of_rows_counts_each_once(both: tuple[Path, Path, Path, str]) -> None:
    assert_same_validation(both[0], both[1], epochs=3, metrics=(*METRICS, "val/rewards/accuracies"))


def test_the_history_of_the_margin_and_the_run_directory_are_one_on_all_processes(
    both: tuple[Path, Path, Path, str],
) -> None:
    one, two, root, _ = both
    states = [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same_history([state["margin_state"] for state in states], one)
    assert [state["folder"] for state in states] == [str(two)] * 2


def test_two_processes_report_export_and_cache_once(both: tuple[Path, Path, Path, str]) -> None:
    one, two, root, said = both
    reports = [json.loads((folder / "report.json").read_text())["pairs"] for folder in (one, two)]
    assert reports[1]["num_pairs"] == reports[0]["num_pairs"] == 11
    for name in ("accuracy_policy", "accuracy_reference"):
        assert reports[1][name]["mean"] == pytest.approx(reports[0][name]["mean"])
    assert {path.name for path in (one / "policy").iterdir()} == {path.name for path in (two / "policy").iterdir()}
    caches = [sorted(root.glob(f"cache-{name}/gamma_po/reference/*/*.safetensors")) for name in ("one", "two")]
    for shards in caches:  # train; validation and test are the same pairs
        assert sorted(len(load_file(shard)["pairs"]) for shard in shards) == [11, 32]
    assert {shard.parent.name for shard in caches[0]} == {shard.parent.name for shard in caches[1]}
    assert [line for line in said.splitlines() if "Warning" in line] == []


def test_two_processes_predict_each_pair_once_and_in_order(
    both: tuple[Path, Path, Path, str], tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    options = [*OBJECTIVE, "--ckpt_path", str(both[1] / "checkpoints" / "last.ckpt")]
    one = run("predict", tiny_model_path, tiny_data, tmp_path / "one", [*options, "--data.eval_batch_size", "2"])
    halved = [*options, "--data.eval_batch_size", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    two_processes(["-m", "gamma_po", "predict", *arguments(tiny_model_path, tiny_data, tmp_path / "two", halved)])
    (two,) = (tmp_path / "two" / "runs" / "run").iterdir()
    tables = [pq.read_table(folder / "predictions.parquet").to_pydict() for folder in (one.trainer_dir, two)]
    assert tables[0]["index"] == tables[1]["index"] == list(range(11))
    for name, expected in tables[0].items():
        assert tables[1][name] == pytest.approx(expected, abs=LOSS_TOLERANCE, rel=1e-5)


GATHER = """
import torch
from gamma_po.ranks import Distributed, current_ranks

torch.distributed.init_process_group("gloo")
ranks = current_ranks()
assert isinstance(ranks, Distributed) and ranks.world_size == 2
for counts in ((0, 3), (2, 1), (2, 2), (0, 0)):
    whole = torch.arange(2 * sum(counts), dtype=torch.float64).view(-1, 2)
    start = sum(counts[: ranks.rank])
    values, own_start = ranks.gather(whole[start : start + counts[ranks.rank]].clone().requires_grad_())
    assert torch.equal(values, whole) and values.dtype == whole.dtype and not values.requires_grad
    assert own_start == start
assert ranks.all_gather(torch.tensor([ranks.rank == 1])).tolist() == [False, True]
torch.distributed.destroy_process_group()
"""


def test_gather_joins_unequal_parts_in_rank_order_and_says_where_the_own_part_begins(tmp_path: Path) -> None:
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    two_processes([str(script)])
    assert isinstance(current_ranks(), Local)

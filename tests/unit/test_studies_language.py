"""Studies on a language model, without the model: what is refused, what a folder may hold, who runs what."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

from gamma_po.commands import study_lm
from gamma_po.commands.study_lm import INTERRUPTED, execute, run_unit, shard_of, status_of
from gamma_po.errors import ConfigError, DataError
from gamma_po.files import write_text
from gamma_po.studies.calibration import choose, clustered_error
from gamma_po.studies.lm_folder import check_same_study
from gamma_po.studies.lm_outcome import training_prompts
from gamma_po.studies.lm_plan import LanguageArm, LanguageStudy, plan
from gamma_po.studies.lm_study import measured_columns, result_file
from tests.tiny import tiny_rows, write_rows


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", tiny_rows(6, seed=len(split)))
    write_fit(tmp_path, {})
    return tmp_path


def write_fit(root: Path, data: dict[str, Any]) -> None:
    splits = {split: str(root / f"{split}.jsonl") for split in ("train", "test")}
    fit = {"trainer": {"max_steps": 4}, "model": {"loss": {"class_path": "DPO"}}, "data": splits | data}
    (root / "fit.yaml").write_text(yaml.safe_dump(fit))


def study_of(root: Path, **options: Any) -> LanguageStudy:
    given = {"arms": {"dpo": LanguageArm(), "oracle": LanguageArm(without_flipped=True)}, "noise": [0.3], "seeds": 1}
    return LanguageStudy(fit=str(root / "fit.yaml"), **(given | options))


def enter(root: Path, device: str = "cpu", **options: Any) -> None:
    study = study_of(root, **options)
    check_same_study(study, plan(study, root / "out", device), root / "out", device)


@pytest.mark.parametrize(
    "change",
    ["fit", "train", "test", "device", "option"],
)
def test_a_study_is_not_continued_after_anything_that_decides_its_results_has_changed(root: Path, change: str) -> None:
    enter(root)
    enter(root)  # nothing has changed
    device, options = "cpu", {}
    if change == "fit":
        write_fit(root, {"batch_size": 3})
    elif change in ("train", "test"):
        write_rows(root / f"{change}.jsonl", tiny_rows(6, seed=77))
    elif change == "device":
        device = "gpu"
    else:
        options = {"kls": [0.5]}
    named = {"fit": "fit_options", "train": "data", "test": "data", "device": "device", "option": "kls"}[change]
    with pytest.raises(ConfigError, match=f"with other options, which differ in {named};"):
        enter(root, device, **options)


def test_shares_that_start_at_once_agree_and_a_strange_folder_is_refused(root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for entered in [pool.submit(enter, root) for _ in range(16)]:
            entered.result()
    assert yaml.safe_load((root / "out" / "plan.yaml").read_text())["seeds"] == 1
    (root / "out" / "plan.yaml").rename(root / "out" / "else.yaml")
    with pytest.raises(ConfigError, match="neither empty nor a study's folder"):
        enter(root)


@pytest.mark.parametrize(
    "options",
    [
        {"invalid_rows": "drop"}, {"duplicates": "drop"}, {"contradictions": "drop"},
        {"validation_share": 0.2}, {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]},
    ],
)  # fmt: skip
def test_options_that_move_rows_are_refused_where_rows_are_joined_by_number(root: Path, options: dict) -> None:
    (name,) = options
    write_fit(root, options)
    with pytest.raises(ConfigError, match=rf"data\.{name}=.* is not allowed; allowed: .*number"):
        plan(study_of(root), root / "out")
    if name != "invalid_rows":
        assert plan(study_of(root, arms={"dpo": LanguageArm()}), root / "out")


@pytest.mark.parametrize("ignored", [{"set": {"model.lora.r": 2}}, {"noise": [0.3]}, {"without_flipped": True}])
def test_a_matched_slope_refuses_options_that_it_would_ignore(root: Path, ignored: dict) -> None:
    arms = {"dpo": LanguageArm(), "kl": LanguageArm(), "like kl": LanguageArm(matched_to="kl", **ignored)}
    (name,) = ignored
    with pytest.raises(ConfigError, match=rf"arms\.like kl\.{name}=.* has the options of 'kl'"):
        study_of(root, arms=arms)


def test_a_choice_of_arms_has_the_base_loss_and_gold_rewards_have_a_kl(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"only=.* allowed: a list with 'dpo'"):
        study_of(root, only=["oracle"])
    with pytest.raises(ConfigError, match="kls"):
        study_of(root, kls=[])
    assert study_of(root, kls=[], gold_columns=[]).base == "dpo"


def test_an_array_with_gaps_is_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def shard(number: int, last: int, count: int) -> tuple[int, int]:
        for name, value in {"ID": number, "MIN": 2, "MAX": last, "COUNT": count}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        return shard_of("slurm")

    assert shard(4, 5, 4) == (2, 4)
    with pytest.raises(ConfigError, match="--shard i/n"):
        shard(6, 10, 5)  # --array=2-10:2


def test_two_processes_at_the_same_run_make_it_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, together = [], threading.Barrier(2)

    def run_one(study: LanguageStudy, run: Any, folder: Path) -> None:
        made.append(run.name)
        time.sleep(0.2)
        write_text(result_file(folder, run), "{}")

    monkeypatch.setattr(study_lm, "run_one", run_one)
    study = study_of(root)
    unit = plan(study, root / "out")[0]

    def start() -> dict[str, str]:
        together.wait()
        return run_unit(study, unit, root / "out")

    with ThreadPoolExecutor(2) as pool:
        assert [started.result() for started in [pool.submit(start), pool.submit(start)]] == [{}, {}]
    assert made == [unit[0].name]


def test_a_file_error_of_one_run_is_reported_and_the_others_go_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_one(study: LanguageStudy, run: Any, folder: Path) -> None:
        if run.arm == "dpo":
            raise OSError(5, "Input/output error", "log.txt")
        write_text(result_file(folder, run), "{}")

    monkeypatch.setattr(study_lm, "run_one", run_one)
    study = study_of(root)
    units = plan(study, root / "out")
    failed = execute(study, units, root / "out", "cpu", 1)
    assert list(failed) == [units[0][0].name] and "log.txt" in failed[units[0][0].name]
    assert result_file(root / "out", units[1][0]).is_file()


class Stop(lightning.pytorch.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")  # of Lightning, about this trainer
def test_an_interruption_that_lightning_turns_into_an_exit_is_one(tmp_path: Path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", callbacks=[Stop()], default_root_dir=tmp_path, **quiet)

    def fit(words: list[str]) -> int:
        trainer.fit(BoringModel())
        return 0

    def refuse(words: list[str]) -> int:
        raise SystemExit(2)

    assert status_of(fit, []) == INTERRUPTED
    assert status_of(refuse, []) == 2


def test_only_what_was_measured_is_compared() -> None:
    nan = float("nan")
    rows = [{"a": 1.0, "b": nan, "c": nan}, {"a": 2.0, "b": 0.0, "c": nan, "d": 1.0}]
    assert measured_columns(rows, ("d", "c", "b", "a", "e")) == ("b", "a")


def test_the_error_of_a_mean_counts_pairs_of_a_prompt_together() -> None:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(400, 50, 1, generator=generator, dtype=torch.float64)
    values = (means + 0.2 * torch.randn(400, 50, 4, generator=generator, dtype=torch.float64)).flatten(1)
    prompts = torch.arange(50).repeat_interleave(4)
    found = clustered_error(values, prompts).mean()
    spread = values.mean(1).std()  # over 400 drawings of 50 prompts
    assert float(found) == pytest.approx(float(spread), rel=0.1)
    assert float(clustered_error(values).mean()) < 0.6 * float(spread)
    with pytest.raises(DataError, match="one prompt"):
        clustered_error(values, torch.zeros(200, dtype=torch.long))


def test_where_no_strength_is_better_few_lists_have_one_chosen() -> None:
    strengths = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(1000, 1, 300, generator=generator)  # neighbouring strengths make like policies
    own = torch.randn(1000, 9, 300, generator=generator)
    likelihoods = torch.tensor(strengths)[:, None].abs() * (torch.tensor(strengths).sign()[:, None] * direction + own)
    chosen = [choose(strengths, one).strength for one in likelihoods]
    share = sum(strength != 0 for strength in chosen) / len(chosen)
    assert 0.01 < share < 0.12


def test_a_list_of_strengths_names_each_once() -> None:
    with pytest.raises(ConfigError, match="each once"):
        choose((0.0, 1.0, 1.0), torch.zeros(3, 4))


def test_training_prompts_are_those_of_all_sources_up_to_their_limits(root: Path) -> None:
    one, two = ([{"prompt": f"{name} {i}", "chosen": "a", "rejected": "b"} for i in range(3)] for name in "xy")
    first, second = write_rows(root / "one.jsonl", one), write_rows(root / "two.jsonl", two)
    sources = [{"path": str(first)}, {"path": str(second), "limit": 1}]
    found = training_prompts({"data": {"train": sources, "limit_train": 2}})
    assert found == {repr("x 0"), repr("x 1"), repr("y 0")}

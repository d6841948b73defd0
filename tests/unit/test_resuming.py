"""What a training's numbers depend on is compared, one by one; checkpoints are told apart by their contents."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gamma_po.ckpt_path import check_no_slurm_files, which_checkpoint
from gamma_po.errors import ConfigError
from gamma_po.resuming import check_same_run, run_settings


class Ddp:
    """Stands for a strategy."""

    root_device = torch.device("cpu")


class Fsdp(Ddp):
    """Stands for another."""


class OnGpu(Ddp):
    """The first one, elsewhere."""

    root_device = torch.device("cuda")


OnGpu.__name__ = "Ddp"
OF_TRAINER = {
    "world_size": (2, 4),
    "strategy": (Ddp(), Fsdp()),
    "device": (Ddp(), OnGpu()),
    "precision": ("32-true", "bf16-mixed"),
    "accumulate_grad_batches": (1, 2),
    "gradient_clip_val": (None, 1.0),
    "gradient_clip_algorithm": ("norm", "value"),
    "limit_train_batches": (1.0, 8),
}
OF_DATA = {
    "batch_size": (4, 8),
    "length_window": (None, 2),
    "max_tokens_per_forward": (None, 250),
    "layout": ("padded", "packed"),
    "label_noise": (0.0, 0.1),
    "label_noise_seed": (0, 1),
    "data_seed": (0, 1),
}
ATTRIBUTES = {"device": "strategy", "data_seed": "seed"}  # that are called otherwise where they stand


def trainer(changed: str | None = None) -> Any:
    """A trainer with the first value of everything; with the second of what is changed."""

    def values(table: dict[str, tuple[Any, Any]]) -> SimpleNamespace:
        names = [name for name in table if name != changed] + [changed] * (changed in table)
        return SimpleNamespace(**{ATTRIBUTES.get(name, name): table[name][name == changed] for name in names})

    made = values(OF_TRAINER)
    made.datamodule = values(OF_DATA)
    return made


@pytest.mark.parametrize("name", [*OF_TRAINER, *OF_DATA])
def test_a_training_goes_on_exactly_only_with_the_same(name: str) -> None:
    saved = run_settings(trainer())
    check_same_run(saved, run_settings(trainer()), "exact")
    here = run_settings(trainer(name))
    with pytest.raises(ConfigError, match=rf"written with {name}=.+, this run has {name}=.+: it would not continue"):
        check_same_run(saved, here, "exact")
    check_same_run(saved, here, "anyway")


def test_a_checkpoint_is_told_from_others_by_its_contents_and_not_by_its_time(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"global_step": 8, "weights": torch.zeros(1000)}, path)
    torch.save({"global_step": 8, "weights": torch.zeros(1000).index_fill(0, torch.tensor([700]), 1e-8)}, other)
    first, second = (which_checkpoint("last.ckpt", file, {"global_step": 8}) for file in (path, other))
    assert first != second and first.startswith("last.ckpt (step 8, contents ")
    shutil.copyfile(path, other)
    assert which_checkpoint("last.ckpt", other, {"global_step": 8}) == first


def test_a_default_folder_with_checkpoints_that_lightning_would_take_is_refused(tmp_path: Path) -> None:
    check_no_slurm_files(tmp_path)
    check_no_slurm_files(tmp_path / "not-there")
    (tmp_path / "hpc_ckpt_12.ckpt").mkdir()  # shards
    with pytest.raises(ConfigError, match=r"holds 'hpc_ckpt_12.ckpt', which Lightning loads by itself.*allowed: null"):
        check_no_slurm_files(tmp_path)

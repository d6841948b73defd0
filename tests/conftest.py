"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For this process and all that it starts: tiny models gain nothing from more threads, and where other work wants the
# same cores, threads that wait for each other make a test many times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.tiny import save_tiny_model, tiny_rows, write_rows

pytest.register_assert_rewrite("tests.same")


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny chat model."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of tiny train, validation and test splits."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": 32, "validation": 10, "test": 11}
    return {
        split: str(write_rows(folder / f"{split}.jsonl", tiny_rows(size, seed=seed)))
        for seed, (split, size) in enumerate(sizes.items())
    }


@pytest.fixture(autouse=True)
def _isolated_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches and runs go to the test's own folder; the random state is the same at every start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["gamma_po"])
    torch.manual_seed(0)

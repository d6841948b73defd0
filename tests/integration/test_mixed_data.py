"""A run on a mixture with held-out prompts, from the command line: what it records runs again and says the same."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from tests.runs import fit, steps_of
from tests.tiny import tiny_rows, write_rows


def test_a_mixture_trains_records_itself_and_logs_its_counts(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny_rows(12, seed=7)
    other = str(write_rows(tmp_path / "other.jsonl", [*rows, rows[0]]))
    given = f"[{{path: {tiny_data['train']}, limit: 20}}, {{path: {other}, weight: 1.5}}]"
    options = ["--data.train", given, "--data.validation_share", "0.2", "--data.validation", "null"]
    options += ["--data.duplicates", "drop", "--data.tokenization.max_completion_length", "10"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, options)
    assert "other.jsonl (weight 1.5)" in "".join(capsys.readouterr().out.split("\n")).replace("  ", " ")
    counts = {name: steps_of(folder, f"data/train/{name}") for name in ("pairs", "duplicates", "held_out_pairs")}
    assert counts["pairs"] == [33] and counts["duplicates"] == [1] and 0 < counts["held_out_pairs"][0] < 16
    with (folder / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"data/train/chosen_truncated", "data/validation/prompts_also_in_training"} <= set(columns or ())
    written = yaml.safe_load((folder / "config.yaml").read_text())["data"]["train"]
    assert [source["path"] for source in written] == [tiny_data["train"], other]
    again = fit(tiny_model_path, tiny_data, tmp_path, [], config=folder / "config.yaml")
    assert again != folder and steps_of(again, "train/loss") == steps_of(folder, "train/loss")

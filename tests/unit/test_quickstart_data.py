"""The shipped quickstart pairs keep what their data card promises."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import gamma_po
from gamma_po.evaluation.gold import VaderSentiment

FOLDER = Path(gamma_po.__file__).parent / "data" / "quickstart"
AT_LEAST = {"train": 1500, "validation": 200, "test": 200}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    """The rows of each split."""
    return {split: pq.read_table(FOLDER / f"{split}.parquet").to_pylist() for split in AT_LEAST}


def test_there_are_enough_pairs_and_prompts(splits: dict[str, list[dict]]) -> None:
    for split, rows in splits.items():
        assert len(rows) >= AT_LEAST[split]
    assert len({row["prompt"] for rows in splits.values() for row in rows}) >= 400


def test_no_prompt_and_no_answer_to_it_stands_in_two_splits(splits: dict[str, list[dict]]) -> None:
    prompts = [{row["prompt"] for row in rows} for rows in splits.values()]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_gold_rewards_are_vaders_and_chosen_has_the_higher_one(splits: dict[str, list[dict]]) -> None:
    gold = VaderSentiment()
    for rows in splits.values():
        for row in rows:
            assert row["reward_chosen"] >= row["reward_rejected"] + 0.02
            assert row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
        texts = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        rewards = [row["reward_chosen"] for row in rows] + [row["reward_rejected"] for row in rows]
        assert gold([""] * len(texts), texts) == rewards


def test_the_data_card_states_the_true_counts(splits: dict[str, list[dict]]) -> None:
    card = (FOLDER / "README.md").read_text()
    for split, rows in splits.items():
        prompts = len({row["prompt"] for row in rows})
        assert f"| {split} | `{split}.parquet` | {len(rows)} | {prompts} |" in card

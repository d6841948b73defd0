"""The cache of tokenised pairs: what it depends on, and that no accident loses or corrupts it."""

from __future__ import annotations

import json
import logging
import pickle
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from gamma_po.data import pair_files
from gamma_po.data.columns import Columns
from gamma_po.data.formatting import read_preferences
from gamma_po.data.pair_files import Chosen, PairFile, Reading, pair_file, prompt_key
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.errors import ConfigError, DataError
from tests.tiny import tiny_rows, tiny_tokenizer

READING = Reading(Columns(), Tokenization(), "error", None)
CHAT = {
    "prompt": [{"role": "system", "content": "كن موجزا"}, {"role": "user", "content": "∑ 1/n² = ?"}],
    "chosen": "π²/6 🙂",
    "rejected": "לא יודע\n\tif x: pass",
}
ROWS = [*tiny_rows(600), CHAT]  # more than are written at once


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerBase, source: str, tmp_path: Path) -> Callable[..., PairFile]:
    def open_(source: str = source, tokenizer: PreTrainedTokenizerBase = tokenizer, **changed: Any) -> PairFile:
        folder = changed.pop("folder", tmp_path / "cache")
        return pair_file(source, tokenizer, READING._replace(**changed), folder, show_progress=False)

    return open_


def test_the_file_holds_the_pairs_that_reading_and_tokenising_in_memory_give(
    opened: Callable[..., PairFile], source: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    preferences, _ = read_preferences(source, Columns())
    tokens, kept, counts = tokenize_preferences(preferences, tokenizer, Tokenization(), show_progress=False)
    for found in (opened(), opened()):  # written, and found again
        assert len(found) == len(kept) == len(ROWS) and found.counts == counts
        assert [found.preference(i) for i in range(len(found))] == preferences
        for i, expected in enumerate(tokens):
            pair = found.tokens(i)
            assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(pair[:3], expected[:3], strict=True))
            assert pair.truncated is expected.truncated


def test_opening_maps_the_file_and_copies_next_to_nothing(opened: Callable[..., PairFile]) -> None:
    path = opened().path
    before = pa.total_allocated_bytes()
    found = PairFile(path, "x")
    assert len(found) == len(ROWS) and pa.total_allocated_bytes() - before < path.stat().st_size / 20


def test_a_worker_maps_the_file_anew_instead_of_being_sent_it(opened: Callable[..., PairFile]) -> None:
    found = opened()
    sent = pickle.dumps(found)
    assert len(sent) < 1000 and pickle.loads(sent).tokens(7).prompt.equal(found.tokens(7).prompt)


def test_chosen_rows_are_a_sequence(opened: Callable[..., PairFile]) -> None:
    found = opened()
    rows = Chosen([found], np.array([[0, 5], [0, 600], [0, 5]]), "preference")
    assert len(rows) == 3 and rows[1].prompt == tuple(CHAT["prompt"]) and rows[0] == rows[2] == rows[-1]
    assert [row.location for row in rows][:2] == [row.location for row in rows[:2]]
    with pytest.raises(IndexError):
        rows[3]


CHANGES: dict[str, dict[str, Any]] = {
    "length": {"tokenization": Tokenization(max_prompt_length=20)},
    "length of both": {"tokenization": Tokenization(max_length=600)},
    "tools": {"columns": Columns(tools=None)},
    "template": {"tokenization": Tokenization(template="text")},
    "columns": {"columns": Columns(prompt=None)},
    "invalid rows": {"invalid_rows": "drop"},
    "limit": {"limit": 10},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_tokens_changes_the_file(change: str, opened: Callable[..., PairFile]) -> None:
    key = pair_files._key
    first = opened()
    reading = READING._replace(**CHANGES[change])
    assert key(first.source, tiny_tokenizer(), reading) != first.path.stem


def test_another_template_tokenizer_or_content_is_another_file_and_another_name_is_not(
    opened: Callable[..., PairFile], tmp_path: Path
) -> None:
    first = opened()
    other = tiny_tokenizer()
    assert opened(tokenizer=other).path == first.path
    other.chat_template = "\n" + other.chat_template
    grown = tiny_tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    rows = write(tmp_path / "other.jsonl", [*ROWS[:-1], CHAT | {"chosen": "π²/6"}])
    assert len({first.path, opened(tokenizer=other).path, opened(tokenizer=grown).path, opened(rows).path}) == 4
    copy = write(tmp_path / "copy.jsonl", ROWS)
    assert opened(copy).path == first.path
    assert opened(copy).preference(3).location == f"{copy}, row 4 (line 4)"


def test_of_runs_that_start_at_once_one_reads_and_all_get_the_same(
    opened: Callable[..., PairFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, built, found = pair_files._build, [], []

    def counted(*arguments: Any) -> None:
        built.append(arguments)
        build(*arguments)

    monkeypatch.setattr(pair_files, "_build", counted)
    threads = [threading.Thread(target=lambda: found.append(opened())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len({file.path for file in found}) == 1 and len(found) == 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99, lambda b: b + b"x"])
def test_a_damaged_file_is_noticed_and_made_anew(
    damage: Callable[[bytes], bytes], opened: Callable[..., PairFile], caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    expected, content = first.preference(600), first.path.read_bytes()
    first.path.unlink()  # a new file: the old one is still mapped
    first.path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        found = opened()
    assert found.preference(600) == expected and found.path.read_bytes() == content
    assert "damaged" in caplog.text and str(first.path) in caplog.text


def test_an_interruption_leaves_nothing_and_what_a_killed_run_left_is_cleared(
    opened: Callable[..., PairFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(rows: Any, *_: Any, **__: Any) -> Any:
        for number, row in enumerate(rows):
            if number == 550:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(pair_files, "track", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    path = opened().path
    path.unlink()
    left_over = path.with_name(f".{path.name}.0123.partial")
    left_over.write_bytes(b"half")
    assert opened().path == path and not left_over.exists()


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(
    opened: Callable[..., PairFile], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ConfigError) as caught:
            opened()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot be written to {tmp_path / 'cache'}: " in str(caught.value)
    assert "set data.cache_dir to another folder" in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert len(opened()) == len(ROWS)


def test_a_folder_that_cannot_be_made_is_told(opened: Callable[..., PairFile], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*taken.*: .*another folder"):
        opened(folder=tmp_path / "taken" / "tokens")


def test_a_bad_row_far_down_loses_no_finished_file(
    opened: Callable[..., PairFile], source: str, tmp_path: Path
) -> None:
    finished = opened().path
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "a", "chosen": " ", "rejected": "b"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, row 602 .*chosen is empty"):
        opened(bad)
    assert finished.is_file() and not list((tmp_path / "cache").glob(".*partial"))


def test_dropped_rows_are_counted_also_when_the_file_is_found(opened: Callable[..., PairFile], tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "a", "chosen": " ", "rejected": "b"}])
    for _ in range(2):
        assert opened(bad, invalid_rows="drop").counts["chosen is empty"] == 1


def test_prompts_are_the_same_however_they_are_written() -> None:
    turn = {"role": "user", "content": "Why?\n"}
    assert prompt_key("Why?") == prompt_key((turn,)) != prompt_key(({"role": "system", "content": "Why?"},))
    assert prompt_key((turn, turn)) != prompt_key("Why?Why?")


def test_a_limit_of_one_column_is_kept_apart_from_another(opened: Callable[..., PairFile]) -> None:
    columns = replace(Columns(), margin=None, system=None)
    assert opened(columns=columns).path != opened().path

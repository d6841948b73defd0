"""Tokenised pairs in memory-mapped files, so that a set may be larger than the memory; cached by content.

A file holds a source's pairs as text and as tokens. It is an Arrow file: nothing in it is executed, pages are read
when they are needed, and row i costs no more than its own bytes. Files are written beside their place and renamed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from gamma_po.data.columns import Columns
from gamma_po.data.formatting import InvalidRows, Preference, iterate_preferences
from gamma_po.data.messages import Prompt
from gamma_po.data.sources import content_key
from gamma_po.data.tokenization import Tokenization, TokenizedPair, tokenize_stream
from gamma_po.errors import ConfigError
from gamma_po.files import locked
from gamma_po.progress import track

log = logging.getLogger(__name__)

VERSION = 4  # of the file's layout and of what becomes of a row: raise it when either changes
ROWS_AT_ONCE = 512
IDS = pa.large_list(pa.int32())
SCHEMA = pa.schema(
    [
        *[(name, IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids")],
        ("truncated", pa.bool_()),
        *[(name, pa.large_string()) for name in ("prompt", "chosen", "rejected")],  # the prompt as JSON
        ("column", pa.float64()),
        ("location", pa.string()),  # without the source's name, which is not part of the content
        *[(name, pa.int64()) for name in ("prompt_key", "chosen_key", "rejected_key")],
    ]
)
COUNTS = b"counts"


class Reading(NamedTuple):
    """All that decides what becomes of a source."""

    columns: Columns
    tokenization: Tokenization
    invalid_rows: InvalidRows
    limit: int | None


class PairFile:
    """A source's pairs on disk.

    Args:
        path: as written by `write_pairs`.
        source: the name that rows are located by.

    Raises:
        pyarrow.ArrowException, OSError, KeyError, ValueError: the file is not whole.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
            self.counts: dict[str, int] = json.loads(last.custom_metadata[COUNTS])
            self.table = reader.read_all()
        if self.table.schema != SCHEMA:
            raise ValueError("another layout")
        self.table.validate(full=True)
        self._batches = self.table.to_batches()
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self._ids = [[_offsets_and_values(batch.column(k)) for k in range(3)] for batch in self._batches]
        self._truncated = self.table["truncated"].to_numpy()

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple[type[PairFile], tuple[Path, str]]:
        return PairFile, (self.path, self.source)  # a worker maps the file anew

    def tokens(self, index: int) -> TokenizedPair:
        """Token ids of a pair."""
        batch, row = self._place(index)
        prompt, chosen, rejected = (
            torch.from_numpy(values[offsets[row] : offsets[row + 1]].copy()) for offsets, values in self._ids[batch]
        )
        return TokenizedPair(prompt, chosen, rejected, bool(self._truncated[index]))

    def preference(self, index: int) -> Preference:
        """Text of a pair."""
        number, row = self._place(index)
        columns = self._batches[number].columns[4:9]
        prompt, chosen, rejected, column, location = (column[row].as_py() for column in columns)
        return Preference(_read_prompt(prompt), chosen, rejected, column, self.source + location)

    def highest_id(self) -> int:
        """The highest token id of all pairs."""
        parts = [values for batch in self._ids for _, values in batch if len(values)]
        return max(int(values.max()) for values in parts)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [N]; those that are missing are NaN."""
        return self.table[name].to_numpy()

    def _place(self, index: int) -> tuple[int, int]:
        batch = bisect_right(self._starts, index) - 1
        return batch, index - self._starts[batch]


def pair_file(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    folder: Path,
    *,
    processes: int = 1,
    show_progress: bool = True,
) -> PairFile:
    """Return the tokenised pairs of a source, from the cache or by reading it once.

    Of several runs or ranks that start at once, one reads and the others wait for it.

    Args:
        source: see `gamma_po.data.sources.read_rows`.
        tokenizer: the policy's.
        reading: how.
        folder: of the cache.
        processes: that tokenise large sets.
        show_progress: False on ranks that should stay quiet.

    Raises:
        ConfigError: the folder cannot be used or is full, or the options do not fit the tokenizer.
        DataError: see `read_preferences` and `tokenize_preferences`.
    """
    path = folder / f"{_key(source, tokenizer, reading)}.arrow"
    found = _open(path, source)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if _open(path, source) is None:
                _build(path, source, tokenizer, reading, processes, show_progress)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: the tokenised pairs cannot be written to {folder}: {error}; free some space or set "
            "data.cache_dir to another folder"
        ) from error
    return PairFile(path, source)


def write_pairs(
    path: Path, source: str, pairs: Iterable[tuple[int, Preference, TokenizedPair]], counts: Counter[str]
) -> None:
    """Write pairs as they come, and the counts that are known at the end; a failure leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    rows = (_row(preference, pair, source) for _, preference, pair in pairs)
    try:
        with open(temporary, "xb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for part in iter(lambda: list(islice(rows, ROWS_AT_ONCE)), []):
                columns = [
                    pa.array(values, field.type) for values, field in zip(zip(*part, strict=True), SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            empty = pa.RecordBatch.from_pylist([], schema=SCHEMA)
            writer.write_batch(empty, custom_metadata={COUNTS: json.dumps(counts).encode()})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def text_key(text: str) -> int:
    """Return 64 bits of a hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def prompt_key(prompt: Prompt) -> int:
    """Return the key of a prompt: a text and the conversation of that one user message are the same prompt.

    >>> prompt_key("Why? ") == prompt_key(({"role": "user", "content": "Why?"},))
    True
    """
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    calls = [[turn["tool_calls"]] if turn.get("tool_calls") else [] for turn in turns]
    parts = [[turn["role"], turn["content"].strip(), *called] for turn, called in zip(turns, calls, strict=True)]
    parts += [["tools", turn["tools"]] for turn in turns if "tools" in turn]
    return text_key(json.dumps(parts))


def _open(path: Path, source: str) -> PairFile | None:
    """Open a file of the cache; one that is not whole counts as absent and is written anew."""
    if not path.is_file():
        return None
    try:
        return PairFile(path, source)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("the tokenised pairs in %s are damaged (%s) and are made anew", path, error)
        return None


def _build(
    path: Path, source: str, tokenizer: PreTrainedTokenizerBase, reading: Reading, processes: int, show: bool
) -> None:
    for left_over in path.parent.glob(f".{path.name}.*.partial"):  # of a run that was killed; the lock is ours
        left_over.unlink(missing_ok=True)
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    preferences = iterate_preferences(
        source, reading.columns, invalid_rows=reading.invalid_rows, limit=reading.limit, dropped=dropped
    )
    shown = track(preferences, f"tokenising {source}", total=reading.limit, visible=show)
    pairs = tokenize_stream(shown, tokenizer, reading.tokenization, counts, processes=processes)

    def counted() -> Iterator[tuple[int, Preference, TokenizedPair]]:
        yield from pairs
        counts.update(dropped)

    write_pairs(path, source, counted(), counts)


def _key(source: str, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> str:
    """A hash of all that the file's content depends on."""
    facts = {
        "version": VERSION,
        "packages": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
        "source": content_key(source),
        "tokenizer": tokenizer_facts(tokenizer),
        "columns": asdict(reading.columns),
        "tokenization": asdict(reading.tokenization),
        "invalid_rows": reading.invalid_rows,
        "limit": reading.limit,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return what decides how a tokenizer and its template treat a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, model, special, tokenizer.chat_template, sorted(tokenizer.all_special_tokens)]


def _row(preference: Preference, pair: TokenizedPair, source: str) -> tuple[Any, ...]:
    location = preference.location.removeprefix(source).encode("utf-8", "backslashreplace").decode()
    return (
        *(ids.numpy() for ids in pair[:3]), pair.truncated,
        json.dumps(preference.prompt), preference.chosen, preference.rejected, preference.column, location,
        prompt_key(preference.prompt), text_key(preference.chosen), text_key(preference.rejected),
    )  # fmt: skip


def _read_prompt(written: str) -> Prompt:
    prompt = json.loads(written)
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _offsets_and_values(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's ids begin and end, and all ids; neither is copied."""
    return column.offsets.to_numpy(), column.values.to_numpy()


class Chosen(Sequence[Any]):
    """Some rows of some files, in some order.

    Args:
        files: of which the rows are.
        places: [N, 2] int64, file and row of each entry.
        kind: "tokens" or "preference".
    """

    def __init__(self, files: Sequence[PairFile], places: np.ndarray, kind: str) -> None:
        self.files, self.places, self.kind = list(files), places, kind

    def __len__(self) -> int:
        return len(self.places)

    def highest_id(self) -> int:
        """The highest token id of the files, whichever of their rows are chosen."""
        return max(file.highest_id() for file in self.files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, row = self.places[index].tolist()
        return getattr(self.files[file], self.kind)(row)

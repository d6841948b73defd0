"""Rows from files, installed packages and the Hugging Face hub; nothing is ever unpickled."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gamma_po.errors import ConfigError, DataError
from gamma_po.packages import PACKAGE_PREFIX, package_file

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ALLOWED = (
    "allowed: a .json, .jsonl, .parquet or .csv file, package:NAME/inner/file, "
    "or a hub data set owner/name or owner/name:split"
)
ROWS_AT_ONCE = 1024  # of a Parquet file: long texts must not fill the memory


class Row(NamedTuple):
    """One row of a source."""

    values: dict[str, Any]
    location: str  # e.g. "pairs.jsonl, row 3 (line 4)": the source as the user gave it, rows counted from 1


def read_rows(source: str) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: a local .json (one list of objects), .jsonl, .parquet or .csv (with a header) file, UTF-8;
            `package:NAME/inner/file` for such a file inside an installed Python package; otherwise a hub data
            set `owner/name` or `owner/name:split` (split: train unless given). Parquet and hub sets give every object
            of a column the same keys, with nulls for those that it did not have: such keys are left out of the
            `arguments` of calls, with those that held a null before, as the two cannot be told apart.

    Returns:
        At least one row.

    Raises:
        DataError: nothing is there, it is empty, or a row cannot be read; names source and row.
    """
    return list(iterate_rows(source))


def iterate_rows(source: str) -> Iterator[Row]:
    """Yield the rows of a source as they are read; see `read_rows`.

    Raises:
        DataError: as in `read_rows`, when the iteration gets there.
    """
    rows = _local_rows(source) if _is_local(source) else _hub_rows(source)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{source}: no rows; at least one is needed")


def content_key(source: str) -> str:
    """Return a key of what a source holds: equal keys mean equal rows, whatever the name or place of the file.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if not _is_local(source):
        name, split = _hub_name(source)
        return f"hub {name}:{split} {_load_hub(name, split, source)._fingerprint}"
    file = _local_file(source)
    try:
        with file.open("rb") as content:
            return f"{file.suffix.lower()} {hashlib.file_digest(content, 'sha256').hexdigest()}"
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error}") from error


def _is_local(source: str) -> bool:
    """Whether `source` means something on this machine, be it there or not."""
    return (
        source.startswith((PACKAGE_PREFIX, ".", "/", "~"))
        or Path(source.partition(":")[0]).suffix.lower() in READERS
        or Path(source).exists()
    )


def _local_file(source: str) -> Path:
    file = _inside_package(source) if source.startswith(PACKAGE_PREFIX) else Path(source).expanduser()
    if not file.exists():
        raise DataError(f"{source}: no such file; {ALLOWED}")
    if not file.is_file():
        raise DataError(f"{source}: this is not a file; {ALLOWED}")
    if file.suffix.lower() not in READERS:
        raise DataError(f"{source}: files ending in {file.suffix!r} are not read; {ALLOWED}")
    return file


def _local_rows(source: str) -> Iterator[Row]:
    file = _local_file(source)
    try:
        yield from READERS[file.suffix.lower()](file, source)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error}") from error


def _inside_package(source: str) -> Path:
    try:
        return package_file(source)
    except ConfigError as error:
        raise DataError(f"{error}; {ALLOWED}") from error


def _json_rows(file: Path, source: str) -> Iterator[Row]:
    rows = _parse_json(file.read_bytes(), source, "; one object per line needs the suffix .jsonl")
    if not isinstance(rows, list):
        raise DataError(f"{source}: a .json file must hold one list of objects, found {json_kind(rows)}")
    for number, value in enumerate(rows, start=1):
        yield _object_row(value, f"{source}, row {number}")


def _jsonl_rows(file: Path, source: str) -> Iterator[Row]:
    number = 0
    with file.open("rb") as lines:  # bytes: text mode would also split at a lone carriage return
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                number += 1
                location = f"{source}, row {number} (line {line_number})"
                yield _object_row(_parse_json(line, location), location)


def _parquet_rows(file: Path, source: str) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(_without_padding(values), f"{source}, row {number}")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read as Parquet after row {number}: {_one_line(error)}") from error


def _csv_rows(file: Path, source: str) -> Iterator[Row]:
    number = 0
    with file.open("rb") as lines:
        # strict: a quote left open is an error, not a very long cell
        reader = csv.reader((line.decode("utf-8") for line in _without_bom(lines)), strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{source}: column names must differ, found {', '.join(header)}")
            for cells in reader:
                if cells:
                    number += 1
                    yield _cells_row(header, cells, f"{source}, row {number} (line {reader.line_num})")
        except UnicodeDecodeError as error:  # the reader has not counted this line
            location = f"{source}, row {number + 1} (line {reader.line_num + 1})"
            raise DataError(f"{location}: not valid UTF-8: {error}") from error
        except csv.Error as error:
            location = f"{source}, row {number + 1} (line {reader.line_num})"
            hint = "; longer texts need .jsonl or .parquet" if "field limit" in str(error) else ""
            raise DataError(f"{location}: not valid CSV: {error}{hint}") from error


def _without_bom(lines: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}


def _hub_rows(source: str) -> Iterator[Row]:
    name, split = _hub_name(source)
    for number, values in enumerate(_load_hub(name, split, source), start=1):
        yield Row(_without_padding(values), f"{name}:{split}, row {number}")


def _hub_name(source: str) -> tuple[str, str]:
    """Name and split of a hub data set."""
    name, _, split = source.partition(":")
    if source.lstrip().startswith(("[", "{")):
        raise DataError(
            f"{source}: not a list of sources; allowed: a list of objects that have a path and may have weight, "
            "limit and columns, or one source"
        )
    if not HUB_NAME.fullmatch(name):
        raise DataError(f"{source}: neither a file nor a hub name; {ALLOWED}")
    if Path(name).exists():  # `datasets` would read it instead of the hub
        raise DataError(f"{source}: {name} is a local folder or file; {ALLOWED}")
    return name, split or "train"


def _load_hub(name: str, split: str, source: str) -> Any:
    """Download (or find in the cache) one split of a hub data set."""
    import datasets  # takes a while, and only hub names need it

    try:
        return datasets.load_dataset(name, split=split)
    except (
        datasets.exceptions.DatasetsError,  # not found, gated, unreadable
        OSError,  # offline, HTTP errors
        ValueError,  # no such split; several configurations
        RuntimeError,  # needs a loading script, which `datasets` no longer runs
    ) as error:
        raise DataError(
            f"{source}: split {split!r} could not be loaded from the hub: {_one_line(error)}; {ALLOWED}"
        ) from error


def _without_padding(value: Any, *, arguments: bool = False) -> Any:
    """A value of an Arrow table whose objects named `arguments` have lost the keys that hold null, at any depth."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if inner is not None or not arguments}
        return {key: _without_padding(inner, arguments=arguments or key == "arguments") for key, inner in kept.items()}
    return [_without_padding(inner, arguments=arguments) for inner in value] if isinstance(value, list) else value


def json_kind(value: object) -> str:
    """Name the kind of a value in a reader's words.

    >>> [json_kind(value) for value in (None, "a", 1.5, [], {})]
    ['null', 'text', 'a number', 'a list', 'an object']
    """
    kinds = {type(None): "null", bool: "true/false", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value)) or {list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _parse_json(text: bytes, location: str, hint: str = "") -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not valid JSON (UTF-8): {_one_line(error)}{hint}") from error


def _object_row(value: Any, location: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{location}: a row must be an object with columns, found {json_kind(value)}")
    return Row(value, location)


def _cells_row(header: list[str], cells: list[str], location: str) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{location}: {len(cells)} cells, but the header has {len(header)} columns: {', '.join(header)}"
        )
    return Row(dict(zip(header, cells, strict=True)), location)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Reading rows: every format gives the same rows, and whatever is wrong is named with its file and row."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gamma_po.data.sources import iterate_rows, read_rows
from gamma_po.errors import ConfigError, DataError
from gamma_po.packages import package_file
from gamma_po.policies import ModelConfig, load_model, load_tokenizer

ROWS = [
    {"prompt": "今天天气怎么样？", "chosen": "晴天。", "rejected": "不知道"},
    {"prompt": "ما اسمك؟", "chosen": "اسمي سلمى", "rejected": "לא יודע"},
    {
        "prompt": "🙂👩‍👩‍👧",
        "chosen": 'he said "a, b"\nand left',
        "rejected": "line\u2028separator\x85and\x0bmore",
    },
]


def as_json(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_csv(rows: list[dict]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    "json": as_json,
    "jsonl": as_jsonl,
    "parquet": as_parquet,
    "csv": as_csv,
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def error_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_returns_the_rows_that_were_written(suffix: str) -> None:
    source = write(f"pairs.{suffix}", WRITERS[suffix](ROWS))
    assert [row.values for row in read_rows(source)] == ROWS


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_located_by_the_name_the_user_gave_counting_from_one(suffix: str) -> None:
    source = write(f"./pairs.{suffix}", WRITERS[suffix](ROWS))
    assert [row.location.partition(" (")[0] for row in read_rows(source)] == [
        f"./pairs.{suffix}, row {number}" for number in (1, 2, 3)
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column_name(suffix: str) -> None:
    source = write(f"pairs.{suffix}", b"\xef\xbb\xbf" + WRITERS[suffix](ROWS))
    assert read_rows(source)[0].values == ROWS[0]


def test_an_upper_case_suffix_is_understood() -> None:
    assert read_rows(write("PAIRS.JSONL", as_jsonl(ROWS)))[1].values == ROWS[1]


def test_lines_of_jsonl_are_counted_also_where_they_are_blank() -> None:
    source = write("pairs.jsonl", '{"a": 1}\n\n  \r\n{"a": 2}\r\n')
    assert [row.location for row in read_rows(source)] == [
        "pairs.jsonl, row 1 (line 1)",
        "pairs.jsonl, row 2 (line 4)",
    ]


def test_csv_lines_are_counted_through_quoted_line_breaks() -> None:
    source = write("pairs.csv", 'a,b\n"x\ny",1\n\nz,2\n')
    assert [(row.values, row.location) for row in read_rows(source)] == [
        ({"a": "x\ny", "b": "1"}, "pairs.csv, row 1 (line 3)"),
        ({"a": "z", "b": "2"}, "pairs.csv, row 2 (line 5)"),
    ]


def test_nested_messages_survive_json_and_parquet() -> None:
    rows = [{"chosen": [{"role": "user", "content": "嗨"}, {"role": "assistant", "content": "你好"}]}]
    for suffix in ("json", "jsonl", "parquet"):
        assert read_rows(write(f"chat.{suffix}", WRITERS[suffix](rows)))[0].values == rows[0]


def test_calls_of_different_arguments_keep_their_own_in_parquet_and_nulls_elsewhere_stay() -> None:
    calls = [{"arguments": {"city": "Paris"}}, {"arguments": {"x": {"y": [1, None]}}}, {"arguments": {}}]
    rows = [{"call": call, "note": note} for call, note in zip(calls, [None, {"a": 1}, {"a": None}], strict=True)]
    assert [row.values for row in read_rows(write("calls.parquet", as_parquet(rows)))] == rows


def test_rows_are_read_only_as_far_as_they_are_needed() -> None:
    rows = iterate_rows(write("pairs.jsonl", '{"a": 1}\nbroken\n'))
    assert next(rows).values == {"a": 1}
    with pytest.raises(DataError, match="row 2"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '{"a": 1}\n{"a": 2\n', ["p.jsonl, row 2 (line 2)", "not valid JSON"]),
        ("p.jsonl", '{"a": 1}\n\n[1, 2]\n', ["p.jsonl, row 2 (line 3)", "must be an object", "found a list"]),
        ("p.jsonl", '"text"\n', ["p.jsonl, row 1", "found text"]),
        ("p.jsonl", "null\n", ["p.jsonl, row 1", "found null"]),
        ("p.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ["p.jsonl, row 2", "UTF-8"]),
        ("p.jsonl", "[" * 100_000, ["p.jsonl, row 1", "not valid JSON"]),
        ("p.jsonl", "\n \n", ["p.jsonl: no rows"]),
        ("p.jsonl", "", ["p.jsonl: no rows"]),
        ("p.json", "[]", ["p.json: no rows"]),
        ("p.json", "", ["p.json: not valid JSON"]),
        ("p.json", '{"a": 1}', ["p.json", "one list of objects", "found an object"]),
        ("p.json", '{"a": 1}\n{"a": 2}', ["p.json: not valid JSON", ".jsonl"]),
        ("p.json", '[{"a": 1}, 3.5]', ["p.json, row 2", "found a number"]),
        ("p.json", '[{"a": 1}, true]', ["p.json, row 2", "found true/false"]),
        ("p.json", b'[{"a": "\xe9"}]', ["p.json", "UTF-8"]),
        ("p.csv", "", ["p.csv: no rows"]),
        ("p.csv", "a,b\n", ["p.csv: no rows"]),
        ("p.csv", "a,b\n1,2\n1,2,3\n", ["p.csv, row 2 (line 3)", "3 cells", "2 columns: a, b"]),
        ("p.csv", "a,b\n1\n", ["p.csv, row 1 (line 2)", "1 cells", "2 columns"]),
        ("p.csv", "a,a\n1,2\n", ["p.csv", "column names must differ", "a, a"]),
        ("p.csv", 'a,b\n1,2\n"open,2\n3,4\n', ["p.csv, row 2", "not valid CSV"]),
        ("p.csv", b"a,b\n1,2\n\xff,2\n", ["p.csv, row 2 (line 3)", "not valid UTF-8"]),
        ("p.csv", b"a,b\n1," + b"x" * 200_000 + b"\n", ["p.csv, row 1 (line 2)", "limit", ".jsonl"]),
        ("p.parquet", b"not parquet at all", ["p.parquet", "Parquet"]),
        ("p.parquet", b"", ["p.parquet", "Parquet"]),
        ("p.parquet", as_parquet(ROWS)[:-20], ["p.parquet", "Parquet"]),
        ("p.parquet", as_parquet(ROWS).replace(b"PAR1", b"XXXX"), ["p.parquet", "Parquet"]),
        ("p.txt", "hello", ["p.txt", "'.txt'", ".parquet or .csv"]),
        ("p", "hello", ["p: files ending in ''", "allowed"]),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_file_row_and_cause(name: str, content: str | bytes, expected: list[str]) -> None:
    message = error_of(write(name, content))
    assert all(part in message for part in expected), message


def test_a_parquet_file_without_rows_is_refused() -> None:
    write("p.parquet", as_parquet(ROWS))
    pq.write_table(pq.read_table("p.parquet").slice(0, 0), "empty.parquet")
    assert "empty.parquet: no rows" in error_of("empty.parquet")


@pytest.mark.parametrize(
    "source",
    [
        "missing.jsonl",
        "sub/missing.csv",
        "sub/MISSING.CSV",
        "./missing",
        "../missing",
        "/no/such/file",
        "~/no-such.json",
        "x.parquet",
    ],
)
def test_a_path_where_nothing_is_stays_a_path_and_is_named(source: str) -> None:
    message = error_of(source)
    assert message.startswith(f"{source}: no such file; allowed:")


def test_a_folder_is_not_mistaken_for_a_hub_name() -> None:
    Path("owner/name").mkdir(parents=True)
    assert "owner/name: this is not a file" in error_of("owner/name")
    assert "owner/name is a local folder" in error_of("owner/name:test")


@pytest.mark.parametrize("source", ["ultrafeedback", "a b/c", "a/b/c", "http://example.org/x", ":train", "json"])
def test_a_name_that_cannot_be_a_hub_name_never_reaches_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert f"{source}: neither a file nor a hub name; allowed:" in error_of(source)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "pkl", "pt", "arrow"])
def test_a_pickle_is_never_executed_whatever_its_name(suffix: str) -> None:
    error_of(write(f"p.{suffix}", pickle.dumps(Bomb())))
    assert not Path("exploded").exists()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with data, whose import would fail."""
    folder = tmp_path / "site" / "pairs_for_tests"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "inner" / "train.jsonl").write_bytes(as_jsonl(ROWS))
    monkeypatch.syspath_prepend(str(folder.parent))
    return "pairs_for_tests"


def test_a_file_inside_a_package_is_read_without_importing_the_package(package: str) -> None:
    source = f"package:{package}/inner/train.jsonl"
    assert [row.values for row in read_rows(source)] == ROWS
    assert read_rows(source)[0].location == f"{source}, row 1 (line 1)"
    assert package_file(source).name == "train.jsonl"


def test_a_package_without_that_file_is_named(package: str) -> None:
    assert f"the package '{package}' has no file 'x.jsonl'" in error_of(f"package:{package}/x.jsonl")
    assert "has no file ''" in error_of(f"package:{package}")
    assert "has no file 'inner'" in error_of(f"package:{package}/inner")


@pytest.mark.parametrize("name", ["no_such_package_here", "not-an-identifier", "", "json5.x", "math"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    assert f"no package '{name}' is installed" in error_of(f"package:{name}/a.jsonl")


def test_a_package_with_one_file_of_a_kind_needs_only_its_name(package: str, tmp_path: Path) -> None:
    folder = tmp_path / "site" / package
    with pytest.raises(ConfigError, match=r"exactly one \.gguf file in the package 'pairs_for_tests', found 0"):
        package_file(f"package:{package}", suffix=".gguf")
    (folder / "a.gguf").touch()
    assert package_file(f"package:{package}", suffix=".gguf") == folder / "a.gguf"
    (folder / "b.gguf").touch()
    with pytest.raises(ConfigError, match="found 2"):
        package_file(f"package:{package}", suffix=".gguf")


def test_a_model_in_a_package_that_is_not_installed_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="no package 'no_such_package_here' is installed"):
        load_model(ModelConfig(path="package:no_such_package_here"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_of_an_unknown_architecture_is_a_configuration_error_of_one_line(load: Callable) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(ConfigError, match=r"could be loaded from './model': ") as caught:
        load(ModelConfig(path="./model"))
    assert "\n" not in str(caught.value)


def test_a_missing_attention_package_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(**_: object) -> None:
        raise ImportError("FlashAttention2 cannot be used: flash_attn is not installed.\nMore lines")

    monkeypatch.setattr("gamma_po.policies.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(ConfigError, match=r"owner/model.*flash_attn is not installed\.$"):
        load_model(ModelConfig(path="owner/model", attention="flash_attention_2"))


def test_a_gguf_path_may_start_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked: list[dict] = []
    monkeypatch.setattr(
        "gamma_po.policies.AutoTokenizer.from_pretrained", lambda **given: asked.append(given) or SimpleNamespace()
    )
    with pytest.raises(ConfigError, match=r"'~/model.gguf': no such file"):
        load_tokenizer(ModelConfig(path="~/model.gguf"))
    Path("model.gguf").touch()
    load_tokenizer(ModelConfig(path="~/model.gguf"))
    assert asked == [{"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "model.gguf"}]


def hub_of(splits: dict[str, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        assert name == "owner/set-1.0"
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_hub_name_reads_the_train_split_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of({"train": ROWS, "test_prefs": ROWS[1:]}, monkeypatch)
    assert [row.values for row in read_rows("owner/set-1.0")] == ROWS
    rows = read_rows("owner/set-1.0:test_prefs")
    assert [row.values for row in rows] == ROWS[1:]
    assert rows[0].location == "owner/set-1.0:test_prefs, row 1"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        FileNotFoundError("nothing there"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        datasets.exceptions.DatasetGenerationError("broken"),
        ValueError('Unknown split "train"'),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_every_failure_of_the_hub_is_told_with_its_cause(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of("owner/name")
    assert "owner/name: split 'train' could not be loaded" in message
    assert str(error) in message and "allowed" in message


def test_a_mistake_in_our_own_call_of_the_hub_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda: None)
    with pytest.raises(TypeError):
        read_rows("owner/name")


def test_without_a_network_the_real_hub_client_gives_a_data_error() -> None:
    code = (
        "from gamma_po.data.sources import read_rows\nfrom gamma_po.errors import DataError\n"
        "try:\n    read_rows('gamma-po-tests/no-such-set:train')\n"
        "except DataError as error:\n    print(error)"
    )
    repository = Path(__file__).resolve().parents[2]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "gamma-po-tests/no-such-set:train: split 'train' could not be loaded" in done.stdout, done.stderr

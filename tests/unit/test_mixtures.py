"""Mixing, holding prompts out, duplicates and contradictions, checked against counting by hand."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamma_po.data.columns import Columns
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.mixtures import Rules, Source, select, shared_prompts
from gamma_po.data.pair_files import PairFile, Reading, pair_file
from gamma_po.data.tokenization import Tokenization
from gamma_po.errors import ConfigError, DataError
from tests.tiny import tiny_rows, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return str(path)


def opened(folder: Path, name: str, rows: list[dict[str, Any]]) -> PairFile:
    source = write(folder / f"{name}.jsonl", rows)
    reading = Reading(Columns(), Tokenization(), "error", None)
    return pair_file(source, TOKENIZER, reading, folder / "cache", show_progress=False)


def data(folder: Path, train: Any, stage: str = "fit", **options: Any) -> PreferenceDataModule:
    module = PreferenceDataModule(train=train, cache_dir=str(folder / "cache"), **options)
    module.tokenizer = TOKENIZER
    module.setup(stage)
    return module


def texts(module: PreferenceDataModule, split: str) -> list[tuple[str, str, str]]:
    return [tuple(pair[:3]) for pair in module.preferences[split]]


PROMPTS = [row(f"p{i // 3}", f"good {i}", f"bad {i}") for i in range(600)]  # three pairs of each of 200 prompts


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_prompt_is_on_both_sides_and_every_pair_is_on_one(share: float, tmp_path: Path) -> None:
    module = data(tmp_path, write(tmp_path / "a.jsonl", PROMPTS), validation_share=share)
    train, validation = texts(module, "train"), texts(module, "validation")
    assert not {pair[0] for pair in train} & {pair[0] for pair in validation}
    assert sorted(train + validation) == sorted((r["prompt"], r["chosen"], r["rejected"]) for r in PROMPTS)
    prompts = len(validation) / 3
    assert abs(prompts - 200 * share) < 4.5 * (200 * share * (1 - share)) ** 0.5  # binomial
    assert module.counts["validation"]["prompts_also_in_training"] == 0


def test_a_conversation_and_a_text_of_the_same_prompt_are_on_the_same_side(tmp_path: Path) -> None:
    rows = [values | {"prompt": [{"role": "user", "content": f"{values['prompt']} \n"}]} for values in PROMPTS]
    module = data(tmp_path, write(tmp_path / "a.jsonl", [*PROMPTS, *rows]), validation_share=0.3)
    assert len(module.datasets["train"]) + len(module.datasets["validation"]) == 1200
    sides = [
        {(p if isinstance(p, str) else p[0]["content"]).strip() for p, _, _ in texts(module, split)}
        for split in ("train", "validation")
    ]
    assert not sides[0] & sides[1]


def test_the_side_of_a_prompt_is_a_function_of_the_seed_and_of_nothing_else(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl", PROMPTS)
    part = write(tmp_path / "b.jsonl", PROMPTS[::-1][:300])
    first = {pair[0] for pair in texts(data(tmp_path, whole, validation_share=0.3), "validation")}
    again = {pair[0] for pair in texts(data(tmp_path, part, validation_share=0.3), "validation")}
    assert again == first & {values["prompt"] for values in PROMPTS[300:]}
    assert first != {pair[0] for pair in texts(data(tmp_path, whole, validation_share=0.3, split_seed=1), "validation")}
    assert first == {pair[0] for pair in texts(data(tmp_path, whole, validation_share=0.3, seed=1), "validation")}


def test_the_limit_of_validation_cuts_the_held_out_pairs_and_that_of_training_what_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", PROMPTS)
    whole = data(tmp_path, source, validation_share=0.3)
    module = data(tmp_path, source, validation_share=0.3, limit_validation=7)
    assert texts(module, "validation") == texts(whole, "validation")[:7]
    assert texts(module, "train") == texts(whole, "train")
    small = data(tmp_path, source, validation_share=0.3, limit_train=90)
    assert sum(len(dataset) for dataset in small.datasets.values()) == 90


def test_validate_alone_reads_the_held_out_pairs(tmp_path: Path) -> None:
    module = data(tmp_path, write(tmp_path / "a.jsonl", PROMPTS), stage="validate", validation_share=0.2)
    assert list(module.datasets) == ["validation"]


@pytest.mark.parametrize(("weight", "total"), [(1, 40), (2, 80), (0.5, 20), (1.25, 50), (0.03, 1)])
def test_a_weight_is_how_often_each_pair_comes(weight: float, total: int, tmp_path: Path) -> None:
    rows = [row(f"q{i}", "yes", "no") for i in range(40)]
    sources = [
        Source(path=write(tmp_path / "a.jsonl", rows), weight=weight),
        Source(path=write(tmp_path / "b.jsonl", [row("x", "y", "z")])),
    ]
    module = data(tmp_path, sources)
    times = Counter(prompt for prompt, _, _ in texts(module, "train"))
    assert times.pop("x") == 1 and times.total() == total
    assert set(times.values()) <= {int(weight), int(weight) + 1}


def test_copies_of_a_pair_have_the_same_label(tmp_path: Path) -> None:
    sources = [Source(path=write(tmp_path / "a.jsonl", PROMPTS), weight=2.5)]
    module = data(tmp_path, sources, label_noise=0.4)
    once = data(tmp_path, sources[0].path, label_noise=0.4)
    expected = dict(zip(texts(once, "train"), once.datasets["train"].flipped.tolist(), strict=True))
    found = zip(texts(module, "train"), module.datasets["train"].flipped.tolist(), strict=True)
    assert len(module.datasets["train"]) == 1500 and all(expected[pair] is flipped for pair, flipped in found)


def test_sources_of_a_mixture_have_limits_and_columns_of_their_own(tmp_path: Path) -> None:
    orca = [{"ask": f"q{i}", "better": "yes", "worse": "no"} for i in range(9)]
    sources = [
        Source(path=write(tmp_path / "a.jsonl", PROMPTS), limit=4),
        Source(
            path=write(tmp_path / "b.jsonl", orca), columns=Columns(prompt="ask", chosen="better", rejected="worse")
        ),
    ]
    module = data(tmp_path, sources, limit_train=6)
    assert [pair[0] for pair in texts(module, "train")] == ["p0", "p0", "p0", "p1", *(f"q{i}" for i in range(6))]
    assert str(module.sources["train"]) == f"{sources[0].path} + {sources[1].path}"


def test_margin_columns_of_a_mixture_are_all_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("p", "a", "b", gap=2)])
    with pytest.raises(ConfigError, match=r"columns\.margin='gap'.*data\.columns\.margin=None"):
        data(tmp_path, [Source(path=path, columns=Columns(margin="gap"))])
    module = data(tmp_path, [Source(path=path, weight=2)], columns=Columns(margin="gap"))
    assert module.datasets["train"].column.tolist() == [2.0, 2.0]


REPEATED = [row("a", "x", "y"), row("b", "x", "y"), row("a", "x", "y"), row("a", "y", "x"), row("c", "y", "x")]


def test_duplicates_and_contradictions_are_counted_and_reported_by_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "a.jsonl", REPEATED)
    with caplog.at_level(logging.WARNING):
        module = data(tmp_path, source)
    assert len(module.datasets["train"]) == 5
    assert (module.counts["train"]["duplicates"], module.counts["train"]["contradictions"]) == (1, 3)
    assert f"1 of 5 pairs repeat an earlier pair, e.g. {source}, row 1 (line 1) and {source}, row 3" in caplog.text
    assert f"3 of 5 pairs contradict another pair (A over B, and B over A), e.g. {source}, row 1" in caplog.text


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"duplicates": "drop"}, ["a", "b", "a", "c"]),
        ({"contradictions": "drop"}, ["b", "c"]),
        ({"duplicates": "drop", "contradictions": "drop"}, ["b", "c"]),
    ],
)
def test_they_can_be_dropped(options: dict[str, Any], left: list[str], tmp_path: Path) -> None:
    module = data(tmp_path, write(tmp_path / "a.jsonl", REPEATED), **options)
    assert [pair[0] for pair in texts(module, "train")] == left


@pytest.mark.parametrize("name", ["duplicates", "contradictions"])
def test_they_can_stop_the_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"of 5 pairs .* row 1 .*`data\.{name}: drop` would drop them"):
        data(tmp_path, write(tmp_path / "a.jsonl", REPEATED), **{name: "error"})


def test_duplicates_are_found_over_sources_too(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [row("a", "x", "y")]) for name in "ab"]
    module = data(tmp_path, [Source(path=path) for path in paths], duplicates="drop")
    assert len(module.datasets["train"]) == 1 and module.counts["train"]["duplicates"] == 1


def test_evaluation_data_is_counted_but_never_thinned(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", REPEATED)
    train = write(tmp_path / "b.jsonl", [row("a", "1", "2"), row("c", "1", "2"), row("d", "1", "2")])
    module = data(tmp_path, train, validation=source, contradictions="error", duplicates="drop")
    assert len(module.datasets["validation"]) == 5 and module.counts["validation"]["duplicates"] == 1
    assert module.counts["validation"]["prompts_also_in_training"] == 2


pairs = st.tuples(st.sampled_from("pq"), *[st.sampled_from("abc")] * 2).filter(lambda pair: pair[1] != pair[2])


@settings(max_examples=30, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=12))
def test_duplicates_and_contradictions_are_those_of_counting(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[str, str, str]]
) -> None:
    file = opened(tmp_path_factory.mktemp("pairs"), "a", [row(*pair) for pair in found])
    counts = select([file], [1.0], Rules()).counts
    assert counts.get("duplicates", 0) == len(found) - len(set(found))
    assert counts.get("contradictions", 0) == sum((p, b, a) in found for p, a, b in found)


def test_all_held_out_or_all_contradicting_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [row("a", "x", "y"), row("a", "y", "x")])
    with pytest.raises(DataError, match=r"no pair is left for train: .*contradictions 2"):
        data(tmp_path, one, contradictions="drop")
    with pytest.raises(DataError, match=r"no pair is left for (train|validation)"):
        data(tmp_path, one, validation_share=0.5)
    with pytest.raises(DataError, match=r"weight 0\.1 leaves none of its 2 pairs"):
        data(tmp_path, [Source(path=one, weight=0.1)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"validation_share": 1.0}, "data.validation_share=1.0"),
        ({"validation_share": -0.1}, "data.validation_share=-0.1"),
        ({"validation_share": 0.1, "validation": "b.jsonl"}, "data.validation='b.jsonl'"),
        ({"duplicates": "remove"}, "data.duplicates='remove'"),
        ({"tokenizing_processes": 0}, "data.tokenizing_processes=0"),
        ({"train": []}, "data.train=[]"),
    ],
)
def test_impossible_options_are_configuration_errors(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        data(tmp_path, **({"train": "a.jsonl"} | options))
    assert expected in str(caught.value) and "allowed" in str(caught.value)


@pytest.mark.parametrize("options", [{"weight": 0}, {"weight": -1.0}, {"weight": float("nan")}, {"limit": 0}])
def test_impossible_sources_are_configuration_errors(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train, (weight|limit) of a\.jsonl="):
        data(tmp_path, [Source(path="a.jsonl", **options)])


def test_shared_prompts_are_counted_once_each(tmp_path: Path) -> None:
    files = [opened(tmp_path, name, tiny_rows(size)) for name, size in (("a", 20), ("b", 10))]
    splits = [select([file], [1.0], Rules()) for file in files]
    assert shared_prompts(splits[1], splits[0]) == 5  # two pairs per prompt

"""Rows in the shapes of public sets are recognised; what could mean two things is refused. All texts are made up."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from gamma_po.data.columns import Columns
from gamma_po.data.formatting import Preference, to_preference
from gamma_po.data.sources import Row
from gamma_po.errors import ConfigError, DataError

WHERE = "pairs.jsonl, row 3 (line 4)"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def sharegpt(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def convert(values: dict[str, Any], **columns: Any) -> Preference:
    return to_preference(Row(values, WHERE), Columns(**columns))


def error_of(values: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(values, **columns)
    assert str(caught.value).startswith(WHERE) and "\n" not in str(caught.value)
    return str(caught.value)


QUESTION, GOOD, BAD = "北京の人口は？", "約2100万人です。", "몰라요"
TURN = said("user", QUESTION)
COUNT = {"type": "function", "function": {"name": "count", "parameters": {}}}
SHAPES: dict[str, tuple[dict[str, Any], Any]] = {
    "UltraFeedback binarized": (
        {
            "prompt": QUESTION, "prompt_id": "a1", "score_chosen": 8.5, "score_rejected": 4.0,
            "messages": [TURN, said("assistant", GOOD)],
            "chosen": [TURN, said("assistant", GOOD)], "rejected": [TURN, said("assistant", BAD)],
        },
        (TURN,),
    ),
    "princeton-nlp/llama3-ultrafeedback": (
        {
            "prompt_id": "a1", "prompt": QUESTION, "all_generated_responses": [BAD, GOOD], "all_rm_scores": [0.1, 0.2],
            "chosen": [TURN, said("assistant", GOOD)], "rejected": [TURN, said("assistant", BAD)],
        },
        (TURN,),
    ),
    "HH-RLHF": (
        {
            "chosen": f"\n\nHuman: hi\n\nAssistant: Hello?\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: hi\n\nAssistant: Hello?\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        },
        (said("user", "hi"), said("assistant", "Hello?"), TURN),
    ),
    "HH-RLHF with its prompt split off": (
        {"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        (TURN,),
    ),
    "Orca DPO pairs": (
        {"system": "Be brief.", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
        (said("system", "Be brief."), TURN),
    ),
    "Orca DPO pairs without a system message": (
        {"system": "", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
        QUESTION,
    ),
    "distilabel Orca pairs": (
        {
            "system": "Be brief.", "input": QUESTION, "chosen": GOOD, "rejected": BAD, "generations": [GOOD, BAD],
            "order": ["chosen", "rejected"], "rating": [9.0, 3.0], "status": "ok",
        },
        (said("system", "Be brief."), TURN),
    ),
    "Argilla's UltraFeedback preferences": (
        {
            "source": "x", "instruction": QUESTION, "chosen_response": GOOD, "rejected_response": BAD,
            "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0,
        },
        QUESTION,
    ),
    "Argilla's cleaned UltraFeedback": (
        {
            "source": "x", "prompt": QUESTION, "chosen-rating": 5.0, "rejected-rating": 2.0,
            "chosen": [TURN, said("assistant", GOOD)], "rejected": [TURN, said("assistant", BAD)],
        },
        (TURN,),
    ),
    "Argilla's Capybara": (
        {
            "source": "x", "conversation": [{"input": QUESTION, "output": GOOD}], "rating_chosen": 5,
            "chosen": [TURN, said("assistant", GOOD)], "rejected": [TURN, said("assistant", BAD)],
        },
        (TURN,),
    ),
    "distilabel ratings": (
        {"instruction": QUESTION, "generations": ["so so", BAD, GOOD, "?"], "ratings": [3, 1, 5, None]},
        QUESTION,
    ),
    "LLaMA-Factory, ShareGPT ranking": (
        {
            "conversations": [sharegpt("human", "hi"), sharegpt("gpt", "Hello?"), sharegpt("human", QUESTION)],
            "chosen": sharegpt("gpt", GOOD), "rejected": sharegpt("gpt", BAD), "system": "Be brief.",
        },
        (said("system", "Be brief."), said("user", "hi"), said("assistant", "Hello?"), TURN),
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [sharegpt("human", "hi"), sharegpt("observation", '{"people": 21}')],
            "chosen": sharegpt("gpt", GOOD), "rejected": sharegpt("gpt", BAD),
        },
        (said("user", "hi"), said("tool", '{"people": 21}')),
    ),
    "LLaMA-Factory, ShareGPT ranking with tools": (
        {
            "conversations": [sharegpt("human", QUESTION)], "tools": '[{"name": "count", "parameters": {}}]',
            "chosen": sharegpt("gpt", GOOD), "rejected": sharegpt("gpt", BAD),
        },
        ({**TURN, "tools": [COUNT]},),
    ),
    "LLaMA-Factory, Alpaca ranking": (
        {"instruction": "Answer.", "input": QUESTION, "chosen": GOOD, "rejected": BAD},
        f"Answer.\n{QUESTION}",
    ),
    "Alpaca ranking without input": (
        {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD, "history": []},
        QUESTION,
    ),
    "Alpaca ranking with earlier turns": (
        {"instruction": QUESTION, "chosen": GOOD, "rejected": BAD, "history": [["hi", "Hello?"]]},
        (said("user", "hi"), said("assistant", "Hello?"), TURN),
    ),
    "Alpaca with a list of two": ({"instruction": QUESTION, "input": "", "output": [GOOD, BAD]}, QUESTION),
    "messages with single answers": (
        {"messages": [TURN], "chosen": said("assistant", GOOD), "rejected": said("assistant", BAD)},
        (TURN,),
    ),
    "content in parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
            "chosen": [said("assistant", GOOD)], "rejected": BAD,
        },
        (TURN,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_public_sets_are_recognised_by_their_shape(shape: str) -> None:
    values, prompt = SHAPES[shape]
    assert convert(values) == Preference(prompt, GOOD, BAD, None, WHERE)


MARGINS = {
    "UltraFeedback binarized": ({"margin": "score_chosen", "margin_minus": "score_rejected"}, 4.5),
    "Argilla's cleaned UltraFeedback": ({"margin": "chosen-rating", "margin_minus": "rejected-rating"}, 3.0),
    "princeton-nlp/llama3-ultrafeedback": ({"margin": "all_rm_scores"}, 0.1),
    "distilabel Orca pairs": ({"margin": "rating"}, 6.0),
    "distilabel ratings": ({"margin": "ratings"}, 4.0),
}


@pytest.mark.parametrize("shape", MARGINS)
def test_ratings_of_public_sets_become_the_margin_column(shape: str) -> None:
    names, expected = MARGINS[shape]
    assert convert(SHAPES[shape][0], **names).column == pytest.approx(expected)


def nested(levels: int) -> dict[str, Any]:
    """An object in an object in ..."""
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


CALL, ANSWERS = {"role": "assistant", "content": ""}, {"chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("values", "columns", "expected"),
    [
        ({"prompt": "q", **ANSWERS, "a": 1}, {"margin": "a", "margin_minus": "b"}, "'b' (as data.columns.margin_minus"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "a": [1]}, {"margin": "a"}, "finite number, found [1]"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "a": [1, "n"]}, {"margin": "a"}, "finite number, found 'n'"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "a": []}, {"margin": "a"}, "finite number, found []"),
        (
            {"question": "q", "instruction": "p", "chosen": "x", "rejected": "y"},
            {},
            "question or instruction could hold the prompt; set data.columns.prompt; columns there: question",
        ),
        (
            {"messages": [TURN], "conversations": [TURN], "chosen": "x", "rejected": "y"},
            {},
            "conversations or messages could hold the prompt",
        ),
        (
            {"prompt": "q", "output": ["x", "y"], "chosen_response": "x", "rejected_response": "y"},
            {},
            "chosen_response with rejected_response or output could hold the completions; set data.columns.chosen",
        ),
        (
            {"prompt": "q", "generations": ["x", "y"], "ratings": [1, 2], "scores": [3, 4]},
            {},
            "generations with ratings or generations with scores could hold the completions",
        ),
        ({"prompt": "q", "generations": ["x", "y"], "ratings": [1]}, {}, "2 generations, but 1 ratings"),
        ({"prompt": "q", "generations": ["x", "y"], "ratings": [1, "good"]}, {}, "found 'good'"),
        ({"prompt": "q", "generations": ["x", "y"], "ratings": [2, 2]}, {}, "no two completions with different"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "system": ["s"]}, {}, "'system' must hold text, found a list"),
        (
            {"prompt": [said("system", "a"), TURN], "chosen": "x", "rejected": "y", "system": "b"},
            {},
            "two system messages; `data.columns.system: null`",
        ),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": "f"}, {}, "'tools' must hold a list of descriptions"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": {"name": "f"}}, {}, 'found {"name": "f"}'),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": "[{]"}, {}, "'tools' must hold a list of descriptio"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": [COUNT, {}]}, {}, "'tools', tool 2: the descripti"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": [{"name": 3}]}, {}, 'a name, found {"name": 3}'),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "tools": ["f"]}, {}, 'tool 1: the description of a tool nee'),
        (
            {"prompt": "q", "chosen": "x", "rejected": "y", "tools": [{"name": "f", "since": date(2026, 1, 1)}]},
            {},
            "tool 1: the name, description and arguments of a tool must be JSON: Object of type date",
        ),
        (
            {"prompt": "q", "chosen": "x", "rejected": "y", "tools": [{"name": "f", "least": float("nan")}]},
            {},
            "tool 1: the name, description and arguments of a tool must be JSON: Out of range float values",
        ),
        (
            {"prompt": "q", "chosen": "x", "rejected": "y", "tools": [{"name": "f", "deep": nested(600)}]},
            {},
            "tool 1: objects and lists in one another; allowed: 100 levels",
        ),
        (
            {"prompt": [TURN, {**CALL, "tool_calls": [{"name": "f", "arguments": nested(600)}]}], **ANSWERS},
            {},
            "objects and lists in one another; allowed: 100 levels",
        ),
        ({"prompt": [TURN, {**CALL, "thinking": "hm"}], **ANSWERS}, {}, "thinking is not read"),
        ({"prompt": "q", **ANSWERS}, {"tools": "functions"}, "no column 'functions' (as data.columns.tools names it"),
        ({"prompt": "q", **ANSWERS}, {"system": "sytem"}, "no column 'sytem' (as data.columns.system names it"),
        ({"instruction": "a", "input": "b", "history": "c", "chosen": "x", "rejected": "y"}, {}, "'history' must hold"),
        ({"instruction": "a", "input": ["b"], "chosen": "x", "rejected": "y"}, {}, "'input' must hold text"),
        ({"text": "q", "label": 1}, {}, "no column 'chosen' (data.columns.chosen can name another)"),
        ({"better": "x", "worse": "y"}, {}, "no column 'chosen'"),
        ({"chosen": "Human: a\n\nAssistant: b", "rejected": "c"}, {}, "no column 'prompt'"),
        ({"question": "q", "chosen": "x", "rejected": "y"}, {"format": "plain"}, "no column 'prompt'"),
        ({"query": "q", "chosen": "x", "rejected": "y"}, {"prompt": "ask"}, "no column 'ask'"),
    ],
)  # fmt: skip
def test_a_row_that_could_mean_several_things_or_nothing_is_refused(values: dict, columns: dict, expected: str) -> None:
    assert expected in error_of(values, **columns)


TOOLS = {
    "objects": [COUNT],
    "JSON text": '[{"type": "function", "function": {"name": "count", "parameters": {}}}]',
    "JSON text of each": ['{"type": "function", "function": {"name": "count", "parameters": {}}}'],
    "bare": [{"name": "count", "parameters": {}}],
    "padded by Parquet": [
        {"type": "function", "function": {"name": "count", "strict": None, "parameters": {"a": None}}, "x": None}
    ],
}


@pytest.mark.parametrize("shape", TOOLS)
def test_tools_are_read_into_the_first_message_in_whatever_shape_they_are_written(shape: str) -> None:
    values = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "tools": TOOLS[shape]}
    assert convert(values).prompt == ({**TURN, "tools": [COUNT]},)
    assert convert(values, format="plain").prompt == convert(values).prompt
    turns = [said("system", "s"), TURN]
    assert convert(values | {"prompt": turns}).prompt == ({**said("system", "s"), "tools": [COUNT]}, TURN)
    assert convert(values | {"system": "s"}).prompt == convert(values | {"prompt": turns}).prompt
    whole = {side: [*turns, said("assistant", text)] for side, text in (("chosen", GOOD), ("rejected", BAD))}
    assert convert(whole | {"tools": TOOLS[shape]}).prompt == convert(values | {"prompt": turns}).prompt


@pytest.mark.parametrize("value", [None, "", " ", "null", "[]", []])
def test_no_tools_are_no_tools(value: Any) -> None:
    values = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "tools": value}
    assert convert(values).prompt == QUESTION


def test_the_column_of_tools_has_a_name_and_can_be_left_unread() -> None:
    values = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "tools": 7, "functions": [COUNT]}
    assert convert(values, tools="functions").prompt == ({**TURN, "tools": [COUNT]},)
    assert convert(values, tools=None).prompt == QUESTION


def test_named_columns_win_over_recognised_ones() -> None:
    values = {"question": "q", "instruction": "p", "chosen": "x", "rejected": "y", "system": "s"}
    assert convert(values, prompt="instruction", system=None).prompt == "p"
    assert convert({"ask": "q", "output": ["a", "b"], "x": "1", "y": "2"}, prompt="ask", chosen="x", rejected="y")[
        :3
    ] == ("q", "1", "2")


@pytest.mark.parametrize("end", ["", "\n\nAssistant:", "\n\nAssistant: "])
def test_a_transcript_that_ends_with_the_human_is_the_prompt_of_an_answer(end: str) -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c" + end
    found = to_preference(Row({"prompt": text, "chosen": " x", "rejected": "y"}, "r"), Columns())
    assert [(turn["role"], turn["content"]) for turn in found.prompt] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip
    assert (found.chosen, found.rejected) == ("x", "y")


def test_plain_reads_transcripts_as_text() -> None:
    text = "\n\nHuman: a\n\nAssistant:"
    values = {"prompt": text, "chosen": " x", "rejected": " y"}
    assert convert(values, format="plain")[:3] == (text, " x", " y")
    assert convert(values)[:3] == ((said("user", "a"),), "x", "y")


def test_a_transcript_keeps_every_line_of_a_turn() -> None:
    code = "def f():\n\n    return {'a': 1}\n"
    values = {"chosen": f"\n\nHuman: 1\n2\n\nAssistant: {code}", "rejected": "\n\nHuman: 1\n2\n\nAssistant: no"}
    found = convert(values)
    assert found.prompt == (said("user", "1\n2"),) and found.chosen == code


def test_a_system_message_that_is_there_already_is_not_doubled() -> None:
    values = {"prompt": [said("system", "s"), TURN], "chosen": "x", "rejected": "y", "system": "s"}
    assert convert(values).prompt == (said("system", "s"), TURN)


@pytest.mark.parametrize("options", [{"format": "sharegpt"}, {"margin_minus": "a"}])
def test_impossible_options_are_configuration_errors(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\."):
        convert({"prompt": "a", "chosen": "b", "rejected": "c"}, **options)

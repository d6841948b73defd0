"""Rows of every accepted shape become the same preference; everything else is refused by row and column."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gamma_po.data.formatting import Columns, Preference, problem, read_preferences, to_preference
from gamma_po.data.sources import Row
from gamma_po.errors import ConfigError, DataError

WHERE = "pairs.jsonl, row 3 (line 4)"
QUESTION, GOOD, BAD = "为什么天是蓝色的？🙂", "بسبب التشتت", "לא יודע"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def convert(columns: Columns | None = None, **values: Any) -> Preference:
    return to_preference(Row(values, WHERE), columns or Columns())


def error_of(columns: Columns | None = None, **values: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(columns, **values)
    message = str(caught.value)
    assert message.startswith(WHERE)
    return message


def pair(prompt: Any = "q", chosen: str = "yes", rejected: str = "no") -> Preference:
    return Preference(prompt, chosen, rejected, None, WHERE)


ONE_TURN = (user(QUESTION),)
TWO_TURNS = (system("be brief"), user("hi"), assistant("hello"), user(QUESTION))


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}, QUESTION),
        ({"prompt": QUESTION, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, QUESTION),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": [assistant(BAD)]}, QUESTION),
        ({"prompt": list(TWO_TURNS), "chosen": GOOD, "rejected": BAD}, TWO_TURNS),
        ({"prompt": list(TWO_TURNS), "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, TWO_TURNS),
        (
            {"prompt": QUESTION, "chosen": [*ONE_TURN, assistant(GOOD)], "rejected": [*ONE_TURN, assistant(BAD)]},
            ONE_TURN,
        ),
        (
            {"prompt": QUESTION, "chosen": [*TWO_TURNS, assistant(GOOD)], "rejected": [*TWO_TURNS, assistant(BAD)]},
            TWO_TURNS,
        ),
        (
            {"prompt": [*TWO_TURNS], "chosen": [*TWO_TURNS, assistant(GOOD)], "rejected": [*TWO_TURNS, assistant(BAD)]},
            TWO_TURNS,
        ),
        ({"chosen": [*TWO_TURNS, assistant(GOOD)], "rejected": [*TWO_TURNS, assistant(BAD)]}, TWO_TURNS),
    ],
)
def test_every_accepted_shape_gives_the_same_completions_and_its_prompt(values: dict, prompt: Any) -> None:
    assert convert(**values) == Preference(prompt, GOOD, BAD, None, WHERE)


def test_white_space_around_a_prompt_of_text_does_not_contradict_its_conversation() -> None:
    values = {"chosen": [user("a\n"), assistant("x")], "rejected": [user("a\n"), assistant("y")]}
    assert convert(prompt=" a", **values).prompt == (user("a\n"),)


def test_columns_can_have_other_names() -> None:
    columns = Columns(prompt="question", chosen="better", rejected="worse", margin="gap")
    found = convert(columns, question=QUESTION, better=GOOD, worse=BAD, gap=2, prompt="not this")
    assert found == Preference(QUESTION, GOOD, BAD, 2.0, WHERE)


def test_a_null_prompt_column_leaves_the_prompt_unread() -> None:
    values = {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")], "prompt": 5}
    assert convert(Columns(prompt=None), **values).prompt == (user("a"),)


def test_ids_and_scores_of_a_message_are_left_out_and_empty_tool_calls_are_no_obstacle() -> None:
    message = user("a") | {"id": 7, "name": None, "tool_calls": None}
    assert convert(prompt=[message], chosen="x", rejected="y").prompt == (user("a"),)


@pytest.mark.parametrize("value", [1, -2.5, "3.25", Decimal("0.5"), 0])
def test_the_margin_column_is_carried_along_as_a_number(value: Any) -> None:
    found = convert(Columns(margin="gap"), prompt="q", chosen="x", rejected="y", gap=value)
    assert found.column == float(value)


@pytest.mark.parametrize(
    "value",
    [None, "", "high", True, [1], float("nan"), float("inf"), "-inf", "nan", 10**400],
    ids=["null", "empty", "word", "true", "list", "nan", "inf", "inf as text", "nan as text", "too large"],
)
def test_a_margin_column_that_is_no_finite_number_is_refused(value: Any) -> None:
    message = error_of(Columns(margin="gap"), prompt="q", chosen="x", rejected="y", gap=value)
    assert "column 'gap' must hold a finite number, found" in message


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected", "gap"])
def test_a_missing_column_is_named_beside_the_columns_that_are_there(missing: str) -> None:
    values = {"prompt": "q", "chosen": "x", "rejected": "y", "gap": 1.0, "extra": 0}
    del values[missing]
    message = error_of(Columns(margin="gap"), **values)
    option = {"gap": "margin"}.get(missing, missing)
    assert f"no column '{missing}' (" in message and f"data.columns.{option} " in message
    assert message.endswith(f"columns there: {', '.join(values)}")


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "found null"),
        (7, "found a number"),
        (0.5, "found a number"),
        (True, "found true/false"),
        ({"text": "x"}, "found an object"),
        ([], "found an empty list"),
        (["text"], "message 1: a message must be an object with role and content, found text"),
        ([user("a"), None], "message 2: a message must be an object with role and content, found null"),
        ([{"from": "human", "text": "x"}], "message 1: a message needs role and content, found from, text"),
        ([{"from": "user 1", "value": "x"}], "unknown role 'user 1'; allowed: system, human"),
        ([{"from": "function_call", "value": "{}"}], "a call of a tool needs a name and arguments (an object, or its"),
        ([{"from": "function_call", "value": "f(1)"}], 'or its JSON text), found "f(1)"'),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "content must be text, found a list"),
        ([{}], "message 1: a message needs role and content, found nothing"),
        ([{"role": "human", "content": "x"}], "unknown role 'human'; allowed: system"),
        ([{"role": ["user"], "content": "x"}], "unknown role ['user']"),
        ([{"role": "user", "content": None}], "content must be text, found null"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content must be text, found a list"),
        (
            [assistant("x") | {"tool_calls": [{"name": "f"}]}],
            "needs a name and arguments (an object, or its JSON text)",
        ),
        ([assistant("x") | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}], "message 1: a call of a tool needs"),
        ([assistant("x") | {"tool_calls": {"name": "f"}}], "tool_calls must be a list, of an assistant"),
        (
            [assistant("x") | {"tool_calls": [{"name": "f", "arguments": {"a": Decimal("0.5")}}]}],
            "message 1: the name, description and arguments of a tool must be JSON: Object of type Decimal",
        ),
        ([user("x") | {"tool_calls": [{"name": "f", "arguments": {}}]}], "tool_calls must be a list, of an assistant"),
        ([assistant("x") | {"function_call": {"name": "f"}}], "function_call is not read; allowed: role, content and"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_by_column_and_kind(column: str, value: Any, found: str) -> None:
    message = error_of(**({"prompt": "q", "chosen": "x", "rejected": "y"} | {column: value}))
    assert f"column '{column}'" in message and found in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # the two conversations differ before their last message
        ({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}, "must agree up to one last"),
        (
            {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("x"), user("b"), assistant("y")]},
            "must agree up to one last",
        ),
        # only one of them is a conversation
        ({"chosen": [user("a"), assistant("x")], "rejected": "y", "prompt": "a"}, "must both be whole conversations"),
        ({"chosen": [assistant("x")], "rejected": [user("a"), assistant("y")], "prompt": "a"}, "must both be whole"),
        # the last message is not the assistant's
        ({"chosen": [assistant("x"), user("a")], "rejected": [assistant("x"), user("b")]}, "prompt ends with an assis"),
        ({"chosen": [system("s"), user("a")], "rejected": [system("s"), user("b")]}, "end with an assistant message"),
        ({"prompt": "a", "chosen": [user("x")], "rejected": [user("y")]}, "found role 'user'"),
        # more than one assistant message after the prompt
        (
            {
                "chosen": [user("a"), assistant("x"), assistant("y")],
                "rejected": [user("a"), assistant("x"), assistant("z")],
            },
            "exactly one assistant message",
        ),
        (
            {
                "prompt": [user("a")],
                "chosen": [assistant("x"), assistant("y")],
                "rejected": [assistant("x"), assistant("z")],
            },
            "followed by one assistant message, but column 'prompt'",
        ),
        ({"prompt": [user("a"), assistant("b")], "chosen": "x", "rejected": "y"}, "prompt ends with an assistant"),
        # the prompt column contradicts the conversations
        (
            {"prompt": "c", "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]},
            "column 'prompt' says something else; `data.columns.prompt: null`",
        ),
        (
            {"prompt": [user("c")], "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]},
            "column 'prompt' says something else",
        ),
        # no prompt anywhere
        ({"chosen": [assistant("x")], "rejected": [assistant("y")]}, "only whole conversations may leave it out"),
    ],
)
def test_conversations_that_are_not_prompt_plus_one_answer_are_refused(values: dict, expected: str) -> None:
    assert expected in error_of(**values)


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        (pair(), None),
        (pair(prompt=(system(""), user("q"))), None),
        (pair(chosen=QUESTION, rejected=QUESTION + " "), None),
        (pair(prompt=""), "prompt is empty"),
        (pair(prompt=" \n"), "prompt is empty"),
        (pair(prompt=(system("s"), user("\u3000"))), "prompt is empty"),
        (pair(chosen=""), "chosen is empty"),
        (pair(rejected="\t \n"), "rejected is empty"),
        (pair(chosen="same", rejected="same"), "chosen and rejected are identical"),
        (pair(chosen="half \ud83d"), "not valid Unicode (an unpaired surrogate)"),
        (pair(prompt=(user("") | {"tools": [{"function": {"name": "f"}}]},)), "prompt is empty"),
        (
            pair(prompt=(user("q") | {"tools": [{"function": {"name": "\udc00"}}]},)),
            "not valid Unicode (an unpaired surrogate)",
        ),
        (
            pair(prompt=(user("\udc00"), assistant("a"), user("q"))),
            "not valid Unicode (an unpaired surrogate)",
        ),
    ],
)
def test_a_problem_with_the_content_is_told_in_words(preference: Preference, expected: str | None) -> None:
    assert problem(preference) == expected


DROPPABLE = {
    "chosen and rejected part before their last message": {
        "chosen": [user("a"), assistant("x")],
        "rejected": [user("b"), assistant("y")],
    },
    "a completion is not an assistant's": {"prompt": "a", "chosen": [user("x")], "rejected": [user("y")]},
    "the prompt ends with an assistant message": {
        "chosen": [user("a"), assistant("x"), assistant("y")],
        "rejected": [user("a"), assistant("x"), assistant("z")],
    },
    "no two completions with different ratings": {"prompt": "a", "generations": ["x", "y"], "ratings": [4, 4]},
}


@pytest.mark.parametrize("reason", DROPPABLE)
def test_rows_that_are_no_pair_can_be_dropped_and_are_counted(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([DROPPABLE[reason], {"prompt": "a", "chosen": "x", "rejected": "y"}]))
    with pytest.raises(DataError, match=r"row 1: .*`data\.invalid_rows: drop` would drop such rows"):
        read_preferences(str(file), Columns())
    kept, dropped = read_preferences(str(file), Columns(), invalid_rows="drop")
    assert len(kept) == 1 and dropped == {reason: 1}


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": " ", "rejected": "y"},
        {"prompt": "c", "chosen": "z", "rejected": "z"},
        {"prompt": "d", "chosen": "x", "rejected": ""},
        {"prompt": "e", "chosen": "", "rejected": "y"},
        {"prompt": "f", "chosen": "\ud83d", "rejected": "y"},
        {"prompt": "g", "chosen": "x", "rejected": "y"},
        {"prompt": "h", "chosen": "x", "rejected": "y"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_the_first_invalid_row_stops_and_says_how_to_drop_it(source: str) -> None:
    with pytest.raises(DataError) as caught:
        read_preferences(source, Columns())
    assert str(caught.value) == (
        f"{source}, row 2 (line 2): chosen is empty; `data.invalid_rows: drop` would drop such rows"
    )


def test_dropped_rows_are_counted_by_their_problem(source: str) -> None:
    kept, dropped = read_preferences(source, Columns(), invalid_rows="drop")
    assert [preference.prompt for preference in kept] == ["a", "g", "h"]
    assert dropped == {
        "chosen is empty": 2,
        "chosen and rejected are identical": 1,
        "rejected is empty": 1,
        "not valid Unicode (an unpaired surrogate)": 1,
    }


@pytest.mark.parametrize(("limit", "prompts"), [(1, ["a"]), (2, ["a", "g"]), (99, ["a", "g", "h"])])
def test_the_limit_counts_valid_pairs(source: str, limit: int, prompts: list[str]) -> None:
    kept, _ = read_preferences(source, Columns(), invalid_rows="drop", limit=limit)
    assert [preference.prompt for preference in kept] == prompts


def test_rows_after_the_limit_are_neither_read_nor_counted(source: str) -> None:
    assert read_preferences(source, Columns(), limit=1)[1] == {}
    assert sum(read_preferences(source, Columns(), invalid_rows="drop", limit=2)[1].values()) == 5


def test_a_row_of_the_wrong_shape_stops_even_where_invalid_rows_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(
        '[{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": null, "rejected": "y"}]'
    )
    with pytest.raises(DataError, match=r"pairs\.json, row 2: column 'chosen' must hold text .* found null"):
        read_preferences(str(file), Columns(), invalid_rows="drop")


def test_a_source_without_a_single_valid_pair_is_refused_with_the_counts(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    rows = [{"prompt": "a", "chosen": "x", "rejected": "x"}] * 3 + [{"prompt": "", "chosen": "x", "rejected": "y"}]
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"no pair is left.*3 × chosen and rejected are identical, 1 × prompt is empty"):
        read_preferences(str(file), Columns(), invalid_rows="drop")


def test_csv_rows_give_text_and_a_numeric_margin(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(f'prompt,chosen,rejected,gap\n{QUESTION},"{GOOD}, {GOOD}",{BAD},-0.5\n', encoding="utf-8")
    (found,), _ = read_preferences(str(file), Columns(margin="gap"))
    assert found[:4] == (QUESTION, f"{GOOD}, {GOOD}", BAD, -0.5)


@pytest.mark.parametrize("cell", [str([user("hi")]), json.dumps([{"from": "human", "value": "hi"}], indent=1)])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_list_of_messages_written_out_as_text_is_refused_unless_read_as_text(column: str, cell: str) -> None:
    values = {"prompt": "q", "chosen": "yes", "rejected": "no"} | {column: cell}
    assert f"column '{column}' holds a list of messages written out as text; allowed: the list itself, in a .jsonl" in (
        error_of(**values)
    )
    assert getattr(convert(Columns(format="plain"), **values), column) == cell


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_a_configuration_error(source: str, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"limit={limit}"):
        read_preferences(source, Columns(), limit=limit)


def test_an_unknown_treatment_of_invalid_rows_is_a_configuration_error(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.invalid_rows='skip'.*error, drop"):
        read_preferences(source, Columns(), invalid_rows="skip")  # type: ignore[arg-type]


CALLS = {
    "OpenAI's": {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    "without content": {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    "bare": {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1}}]},
    "ShareGPT's": {"from": "function_call", "value": '{"id": "c1", "name": "add", "arguments": {"a": 1}}'},
}


@pytest.mark.parametrize("shape", CALLS)
def test_calls_of_tools_are_read_in_the_shapes_in_which_people_write_them(shape: str) -> None:
    answer = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    found = convert(prompt=[user("1 + 1?"), CALLS[shape], answer], chosen="two", rejected="three")
    call = found.prompt[1]["tool_calls"][0]
    assert call["function"] == {"name": "add", "arguments": {"a": 1}} and call["type"] == "function"
    assert found.prompt[1]["content"] == "" and found.prompt[2] == answer
    assert found.chosen == "two"

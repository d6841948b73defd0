"""From rows to preferences: one prompt and two completions, whatever the shape of the row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from gamma_po.data.columns import Columns, UselessPair, missing, number, recognise
from gamma_po.data.messages import (
    Message,
    Prompt,
    described_tools,
    is_transcript,
    is_written_out,
    text_or_messages,
    texts_of,
    transcript_messages,
    waits_for_an_answer,
)
from gamma_po.data.sources import Row, iterate_rows, json_kind
from gamma_po.errors import DataError, require

InvalidRows = Literal["error", "drop"]

UNPAIRED_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can hold half a character; tokenizers fail on it


class Preference(NamedTuple):
    """Two completions of one prompt, as text."""

    prompt: Prompt
    chosen: str
    rejected: str
    column: float | None  # the margin column's value
    location: str  # the row it comes from


def to_preference(row: Row, columns: Columns) -> Preference:
    """Convert a row.

    Understood: a prompt (text or messages) with completions that are text or one assistant message; whole
    conversations as chosen and rejected, which must agree up to their last message, an assistant's. A prompt
    of text beside whole conversations must be one of their messages. Messages and tools are those of
    `gamma_po.data.messages`; other columns than the named ones are found by `gamma_po.data.columns.recognise`.

    Raises:
        DataError: a column is missing or holds something else; names the row, the column, what was found
            and what is allowed.
        UselessPair: the conversations are not a pair.
    """
    row, columns = recognise(row, columns)
    chosen, rejected = (_part(row, name, columns) for name in ("chosen", "rejected"))
    prompt: Prompt | None = None
    if columns.prompt is not None and columns.prompt in row.values:
        prompt = _part(row, "prompt", columns)
    if columns.format == "auto":
        prompt, chosen, rejected = _without_transcripts(prompt, chosen, rejected)
    if _is_conversation(chosen) != _is_conversation(rejected):
        raise DataError(
            f"{row.location}: columns {columns.chosen!r} and {columns.rejected!r} must both be whole "
            "conversations, or both be text or one assistant message"
        )
    if _is_conversation(chosen):
        prompt = _shared_prompt(row, columns, prompt, chosen, rejected)
    elif prompt is None:
        hint = "only whole conversations may leave it out; data.columns.prompt can name another"
        raise missing(row, columns.prompt or "prompt", hint)
    prompt = _with_system(row, columns, prompt)
    if not isinstance(prompt, str):
        _check_prompt_turns(row, prompt)
    return Preference(
        prompt=_with_tools(row, columns, prompt),
        chosen=_completion(row, columns.chosen, chosen),
        rejected=_completion(row, columns.rejected, rejected),
        column=number(row, columns),
        location=row.location,
    )


def prompt_of(row: Row, columns: Columns) -> Prompt:
    """Convert the prompt of a row as `to_preference` does; completions need not be there, and are not read.

    Raises:
        DataError: as there.
    """
    prompt: Prompt = _part(row, "prompt", columns)
    if columns.format == "auto":
        prompt = _without_transcripts(prompt, "", "")[0] or prompt
    return _with_tools(row, columns, _with_system(row, columns, prompt))


def problem(preference: Preference) -> str | None:
    """Say in words why a pair is of no use for training, or return None.

    >>> problem(Preference("Why?", "Because.", " ", None, "pairs.csv, row 1"))
    'rejected is empty'
    """
    turns = texts_of(preference.prompt)
    texts = {"prompt": turns[-1], "chosen": preference.chosen, "rejected": preference.rejected}
    for name, text in texts.items():
        if not text.strip():
            return f"{name} is empty"
    if preference.chosen == preference.rejected:
        return "chosen and rejected are identical"
    if any(UNPAIRED_SURROGATE.search(text) for text in [*turns, *texts.values()]):
        return "not valid Unicode (an unpaired surrogate)"
    return None


def read_preferences(
    source: str, columns: Columns, *, invalid_rows: InvalidRows = "error", limit: int | None = None
) -> tuple[list[Preference], dict[str, int]]:
    """Read, convert and check the pairs of a source.

    Args:
        source: see `gamma_po.data.sources.read_rows`.
        columns: which column holds what.
        invalid_rows: what to do with a row that has a `problem` or whose conversations are not a pair: stop, or
            drop and count it. Rows whose columns are missing or hold something else always stop.
        limit: read only until so many valid pairs are found, >= 1.

    Returns:
        At least one pair, and how many rows were dropped for each problem.

    Raises:
        ConfigError: an option has no such value.
        DataError: a row cannot be used, or none is left.
    """
    dropped: Counter[str] = Counter()
    found = iterate_preferences(source, columns, invalid_rows=invalid_rows, limit=limit, dropped=dropped)
    return list(found), dict(dropped)


def iterate_preferences(
    source: str, columns: Columns, *, invalid_rows: InvalidRows, limit: int | None, dropped: Counter[str]
) -> Iterator[Preference]:
    """Yield the pairs of a source as they are read; see `read_preferences`.

    Args:
        source: as there.
        columns: as there.
        invalid_rows: as there.
        limit: as there.
        dropped: counts the rows that are dropped, by problem.

    Raises:
        ConfigError: an option has no such value.
        DataError: when the iteration gets to a row that cannot be used, or to the end without a pair.
    """
    allowed = get_args(InvalidRows)
    require(invalid_rows in allowed, "data.invalid_rows", invalid_rows, ", ".join(allowed))
    require(limit is None or limit >= 1, "limit", limit, "an integer >= 1, or null for all pairs")
    empty = True
    for preference in islice(_valid_pairs(source, columns, invalid_rows, dropped), limit):
        empty = False
        yield preference
    if empty:
        counts = ", ".join(f"{count} × {found}" for found, count in dropped.items())
        raise DataError(f"{source}: no pair is left after dropping invalid rows: {counts}")


def _valid_pairs(
    source: str, columns: Columns, invalid_rows: InvalidRows, dropped: Counter[str]
) -> Iterator[Preference]:
    for row in iterate_rows(source):
        try:
            preference = to_preference(row, columns)
        except UselessPair as error:
            if invalid_rows == "error":
                raise
            dropped[error.reason] += 1
            continue
        found = problem(preference)
        if found is None:
            yield preference
        elif invalid_rows == "error":
            raise DataError(f"{row.location}: {found}; `data.invalid_rows: drop` would drop such rows")
        else:
            dropped[found] += 1


def chat_text(prompt: Prompt, completion: str | None, tokenizer: PreTrainedTokenizerBase, location: str) -> str:
    """Render a conversation with the tokenizer's chat template.

    Args:
        prompt: text (one user message) or messages, the first of which may carry tools.
        completion: the assistant's answer; None for the prompt alone, up to where an answer would begin.
        tokenizer: has a chat template.
        location: the row, for errors.

    Raises:
        DataError: the template refuses the conversation, or cannot join its parts to text.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    tools = messages[0].get("tools")
    messages[0] = {key: value for key, value in messages[0].items() if key != "tools"}
    if completion is not None:
        messages.append({"role": "assistant", "content": completion})
    begins = completion is None
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=begins)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{location}: the chat template refuses the conversation: {error}") from error


def _part(row: Row, name: str, columns: Columns) -> str | tuple[Message, ...]:
    column = getattr(columns, name) or name
    if column not in row.values:
        raise missing(row, column, f"data.columns.{name} can name another")
    value, where = row.values[column], f"{row.location}: column {column!r}"
    if columns.format == "auto" and isinstance(value, str) and is_written_out(value):
        raise DataError(
            f"{where} holds a list of messages written out as text; allowed: the list itself, in a .jsonl or .parquet "
            f"file; `data.columns.format: plain` would read it as text"
        )
    return text_or_messages(value, where)


def _without_transcripts(
    prompt: Prompt | None, chosen: str | tuple[Message, ...], rejected: str | tuple[Message, ...]
) -> tuple[Prompt | None, str | tuple[Message, ...], str | tuple[Message, ...]]:
    """Turn transcripts into messages: both completions with their prompts, or a prompt that an answer may follow."""
    if isinstance(prompt, str) and waits_for_an_answer(prompt):
        turns = transcript_messages(prompt)
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if isinstance(chosen, str) and isinstance(rejected, str) and not is_transcript(chosen):
            return prompt, chosen.removeprefix(" "), rejected.removeprefix(" ")
    if all(isinstance(side, str) and is_transcript(side) for side in (chosen, rejected)):
        return prompt, transcript_messages(chosen), transcript_messages(rejected)
    return prompt, chosen, rejected


def _is_conversation(completion: str | tuple[Message, ...]) -> bool:
    return not isinstance(completion, str) and len(completion) > 1


def _shared_prompt(
    row: Row,
    columns: Columns,
    prompt: Prompt | None,
    chosen: str | tuple[Message, ...],
    rejected: str | tuple[Message, ...],
) -> tuple[Message, ...]:
    """The conversation before the last message, which must be the same everywhere it is given."""
    shared = tuple(chosen[:-1])
    where = f"{row.location}: columns {columns.chosen!r} and {columns.rejected!r}"
    if shared != tuple(rejected[:-1]):
        explanation = "conversations must agree up to one last assistant message, and they do not"
        raise UselessPair(where, explanation, "chosen and rejected part before their last message")
    if isinstance(prompt, str):
        agrees = prompt.strip() in [message["content"].strip() for message in shared]
    else:
        agrees = prompt is None or prompt == shared
    if not agrees:
        raise DataError(
            f"{where}: conversations must be the prompt followed by one assistant message, but column "
            f"{columns.prompt!r} says something else; `data.columns.prompt: null` would leave it unread"
        )
    return shared


def _with_system(row: Row, columns: Columns, prompt: Prompt) -> Prompt:
    """The prompt after the system message of a column of its own, unless it begins with it."""
    text = _of_named_column(row, columns.system, "system")
    if text is None or text == "":
        return prompt
    if not isinstance(text, str):
        raise DataError(f"{row.location}: column {columns.system!r} must hold text, found {json_kind(text)}")
    system = {"role": "system", "content": text}
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if turns[0] == system:
        return turns
    if turns[0]["role"] in ("system", "developer"):
        raise DataError(
            f"{row.location}: column {columns.system!r} and the first message of the prompt are two system messages; "
            "`data.columns.system: null` would leave the column unread"
        )
    return (system, *turns)


def _with_tools(row: Row, columns: Columns, prompt: Prompt) -> Prompt:
    """The prompt whose first message carries the tools of a column of its own, if there are any."""
    value = _of_named_column(row, columns.tools, "tools")
    tools = described_tools(value, f"{row.location}: column {columns.tools!r}")
    if not tools:
        return prompt
    first, *others = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return ({**first, "tools": tools}, *others)


def _of_named_column(row: Row, column: str | None, default: str) -> Any:
    """What a column holds that rows need not have, unless it was named: then a misspelt name must not pass."""
    if column not in (None, default) and column not in row.values:
        raise missing(row, column, f"as data.columns.{default} names it; null where a row has nothing to say")
    return None if column is None else row.values.get(column)


def _check_prompt_turns(row: Row, prompt: Sequence[Message]) -> None:
    if not prompt or prompt[-1]["role"] == "assistant":
        explanation = (
            "the prompt ends with an assistant message; it must end with another role, and each completion must be "
            "exactly one assistant message"
        )
        raise UselessPair(row.location, explanation, "the prompt ends with an assistant message")


def _completion(row: Row, column: str, value: str | tuple[Message, ...]) -> str:
    """The text of a completion, whose prompt is known by now."""
    if isinstance(value, str):
        return value
    role = value[-1]["role"]
    if value[-1].get("tool_calls"):
        explanation = f"column {column!r} is a call of a tool; only text can be a completion"
        raise UselessPair(row.location, explanation, "a completion is a call of a tool")
    if role != "assistant":
        explanation = f"column {column!r} must end with an assistant message, found role {role!r}"
        raise UselessPair(row.location, explanation, "a completion is not an assistant's")
    return value[-1]["content"]

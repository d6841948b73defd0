"""From rows to preferences: one prompt and two completions, whatever the shape of the row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from gamma_po.data.sources import Row, iterate_rows, json_kind
from gamma_po.errors import DataError, require

Message = dict[str, str]  # role, content
Prompt = str | tuple[Message, ...]  # plain text, or a conversation that does not end with the assistant
InvalidRows = Literal["error", "drop"]

ROLES = ("system", "developer", "user", "assistant", "tool")
UNPAIRED_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can hold half a character; tokenizers fail on it
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content")


class Preference(NamedTuple):
    """Two completions of one prompt, as text."""

    prompt: Prompt
    chosen: str
    rejected: str
    column: float | None  # the margin column's value
    location: str  # the row it comes from


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a row holds what.

    Args:
        prompt: text or messages. May be missing, or null to leave it unread, where chosen and rejected are
            whole conversations.
        chosen: the better completion: text, one assistant message, or the whole conversation.
        rejected: the worse completion.
        margin: a finite number to carry along with each pair (e.g. a rating gap); null for none.
    """

    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str | None = None


def to_preference(row: Row, columns: Columns) -> Preference:
    """Convert a row.

    Understood: a prompt (text or messages) with completions that are text or one assistant message; whole
    conversations as chosen and rejected, which must agree up to their last message, an assistant's. A prompt
    of text beside whole conversations must be one of their messages.

    Raises:
        DataError: a column is missing or holds something else; names the row, the column, what was found
            and what is allowed.
    """
    chosen = _text_or_messages(row, columns.chosen)
    rejected = _text_or_messages(row, columns.rejected)
    if _is_conversation(chosen) != _is_conversation(rejected):
        raise DataError(
            f"{row.location}: columns {columns.chosen!r} and {columns.rejected!r} must both be whole "
            "conversations, or both be text or one assistant message"
        )
    prompt: Prompt | None = None
    if columns.prompt is not None and columns.prompt in row.values:
        prompt = _text_or_messages(row, columns.prompt)
    if _is_conversation(chosen):
        prompt = _shared_prompt(row, columns, prompt, chosen, rejected)
    elif prompt is None:
        raise _missing(row, columns.prompt or "prompt", "only whole conversations may leave it out")
    if not isinstance(prompt, str):
        _check_prompt_turns(row, prompt)
    return Preference(
        prompt=prompt,
        chosen=_completion(row, columns.chosen, chosen),
        rejected=_completion(row, columns.rejected, rejected),
        column=None if columns.margin is None else _number(row, columns.margin),
        location=row.location,
    )


def problem(preference: Preference) -> str | None:
    """Say in words why a pair is of no use for training, or return None.

    >>> problem(Preference("Why?", "Because.", " ", None, "pairs.csv, row 1"))
    'rejected is empty'
    """
    prompt = preference.prompt
    turns = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
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
        invalid_rows: what to do with a row that has a `problem`: stop, or drop and count it. Rows of a wrong
            shape always stop.
        limit: read only until so many valid pairs are found, >= 1.

    Returns:
        At least one pair, and how many rows were dropped for each problem.

    Raises:
        ConfigError: an option has no such value.
        DataError: a row cannot be used, or none is left.
    """
    allowed = get_args(InvalidRows)
    require(invalid_rows in allowed, "data.invalid_rows", invalid_rows, ", ".join(allowed))
    require(limit is None or limit >= 1, "limit", limit, "an integer >= 1, or null for all pairs")
    dropped: Counter[str] = Counter()

    def valid_pairs() -> Iterator[Preference]:
        for row in iterate_rows(source):
            preference = to_preference(row, columns)
            found = problem(preference)
            if found is None:
                yield preference
            elif invalid_rows == "error":
                raise DataError(f"{row.location}: {found}; `data.invalid_rows: drop` would drop such rows")
            else:
                dropped[found] += 1

    preferences = list(islice(valid_pairs(), limit))
    if not preferences:
        counts = ", ".join(f"{count} × {found}" for found, count in dropped.items())
        raise DataError(f"{source}: no pair is left after dropping invalid rows: {counts}")
    return preferences, dict(dropped)


def chat_text(prompt: Prompt, completion: str | None, tokenizer: PreTrainedTokenizerBase, location: str) -> str:
    """Render a conversation with the tokenizer's chat template.

    Args:
        prompt: text (one user message) or messages.
        completion: the assistant's answer; None for the prompt alone, up to where an answer would begin.
        tokenizer: has a chat template.
        location: the row, for errors.

    Raises:
        DataError: the template refuses the conversation.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if completion is not None:
        messages.append({"role": "assistant", "content": completion})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=completion is None)
    except TemplateError as error:
        raise DataError(f"{location}: the chat template refuses the conversation: {error}") from error


def _text_or_messages(row: Row, column: str) -> str | tuple[Message, ...]:
    if column not in row.values:
        raise _missing(row, column)
    value = row.values[column]
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value:
        return tuple(_message(row, column, position, item) for position, item in enumerate(value, start=1))
    found = "an empty list" if isinstance(value, list | tuple) else json_kind(value)
    raise DataError(f"{row.location}: column {column!r} must hold text or a list of messages, found {found}")


def _message(row: Row, column: str, position: int, item: Any) -> Message:
    """Role and content of a message; what else it holds (ids, scores) is not part of the conversation."""
    where = f"{row.location}: column {column!r}, message {position}"
    if not isinstance(item, dict):
        raise DataError(f"{where}: a message must be an object with role and content, found {json_kind(item)}")
    if "role" not in item or "content" not in item:
        raise DataError(f"{where}: a message needs role and content, found {', '.join(map(str, item)) or 'nothing'}")
    if item["role"] not in ROLES:
        raise DataError(f"{where}: unknown role {item['role']!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(item["content"], str):
        raise DataError(f"{where}: content must be text, found {json_kind(item['content'])}")
    unsupported = [key for key in UNSUPPORTED_KEYS if item.get(key)]
    if unsupported:
        raise DataError(f"{where}: {', '.join(unsupported)} cannot be trained on; allowed: role and content")
    return {"role": item["role"], "content": item["content"]}


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
        raise DataError(f"{where}: conversations must agree up to one last assistant message, and they do not")
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


def _check_prompt_turns(row: Row, prompt: Sequence[Message]) -> None:
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{row.location}: the prompt ends with an assistant message; it must end with another role, and "
            "each completion must be exactly one assistant message"
        )


def _completion(row: Row, column: str, value: str | tuple[Message, ...]) -> str:
    """The text of a completion, whose prompt is known by now."""
    if isinstance(value, str):
        return value
    if value[-1]["role"] != "assistant":
        raise DataError(
            f"{row.location}: column {column!r} must end with an assistant message, found role {value[-1]['role']!r}"
        )
    return value[-1]["content"]


def _number(row: Row, column: str) -> float:
    """The finite number in a column; CSV files write it as text."""
    if column not in row.values:
        raise _missing(row, column)
    value = row.values[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{row.location}: column {column!r} must hold a finite number, found {value!r}")
    return number


def _missing(row: Row, column: str, hint: str = "") -> DataError:
    there = ", ".join(map(str, row.values)) or "none"
    return DataError(f"{row.location}: no column {column!r}{hint and f' ({hint})'}; columns there: {there}")

"""Which columns hold prompt and completions: as configured, or recognised by the shape of the row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from gamma_po.data.messages import Message, is_transcript
from gamma_po.data.sources import Row
from gamma_po.errors import DataError, require

Format = Literal["auto", "plain"]

PAIRS = (("chosen_response", "rejected_response"),)  # other names of chosen and rejected
LISTS = ("generations", "responses", "completions")  # several answers ...
SCORES = ("ratings", "rating", "scores")  # ... and what each is worth
PROMPTS = ("question", "instruction", "input", "query", "conversations", "conversation", "messages")
PLAIN = "; `data.columns.format: plain` reads only the columns that are named"


class UselessPair(DataError):
    """A row of the right shape whose content cannot be a pair; `data.invalid_rows: drop` drops and counts it."""

    def __init__(self, where: str, explanation: str, reason: str) -> None:
        super().__init__(f"{where}: {explanation}; `data.invalid_rows: drop` would drop such rows")
        self.reason = reason  # the same for all rows of its kind


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a row holds what.

    Args:
        prompt: text or messages. May be missing, or null to leave it unread, where chosen and rejected are
            whole conversations.
        chosen: the better completion: text, one assistant message, or the whole conversation.
        rejected: the worse completion.
        system: a system message to put before the prompt; null to leave it unread. Rows need not have a column of
            the default name; one of another name must be in each of them.
        tools: descriptions of the tools that the assistant may call, part of the prompt: a list of objects, or the
            same as JSON text; null and columns as for `system`.
        margin: a finite number to carry along with each pair (e.g. a rating gap), or a list of scores, of which
            the best minus the worst is taken; null for none.
        margin_minus: a column to subtract from `margin`: the rejected completion's rating where `margin` is the
            chosen one's.
        format: auto recognises rows of other shapes where `prompt`, `chosen` or `rejected` have their default
            names and are not there (see `recognise`), and transcripts; plain reads the named columns as they are.

    Raises:
        ConfigError: a value is not allowed.
    """

    prompt: str | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = "system"
    tools: str | None = "tools"
    margin: str | None = None
    margin_minus: str | None = None
    format: Format = "auto"

    def __post_init__(self) -> None:
        require(self.format in get_args(Format), "data.columns.format", self.format, ", ".join(get_args(Format)))


def recognise(row: Row, columns: Columns) -> tuple[Row, Columns]:
    """Say where in this row prompt and completions are, if not in the columns that are named.

    Completions: `chosen_response` and `rejected_response`; `output` as a list of two, the better first;
    `generations`, `responses` or `completions` with `ratings` or `scores`, of which the best and the worst are
    taken. Prompts: `question`, `instruction` (with `input` and `history` as in Alpaca's files), `input`, `query`,
    `conversations`, `conversation` or `messages`.

    Args:
        row: any.
        columns: as configured.

    Returns:
        The row, perhaps with a column more, and the columns that hold its parts.

    Raises:
        DataError: more than one column could be meant; names them and the option to set.
        UselessPair: no two completions have different ratings.
    """
    if columns.format == "plain":
        return row, columns
    row, columns = _find_completions(row, columns)
    return _find_prompt(row, columns)


def number(row: Row, columns: Columns) -> float | None:
    """The pair's finite number, or None where no column is named.

    Raises:
        ConfigError: there is only something to subtract.
        DataError: a column is missing or holds something else.
    """
    if columns.margin is None:
        needed = "null, as data.columns.margin names no column to subtract it from"
        require(columns.margin_minus is None, "data.columns.margin_minus", columns.margin_minus, needed)
        return None
    minus = 0.0 if columns.margin_minus is None else _finite(row, columns.margin_minus, "margin_minus")
    return _finite(row, columns.margin, "margin") - minus


def missing(row: Row, column: str, hint: str = "") -> DataError:
    """The error for a column that is not there."""
    there = ", ".join(map(str, row.values)) or "none"
    return DataError(f"{row.location}: no column {column!r}{hint and f' ({hint})'}; columns there: {there}")


def _find_completions(row: Row, columns: Columns) -> tuple[Row, Columns]:
    default = (columns.chosen, columns.rejected) == ("chosen", "rejected")
    if not default or columns.chosen in row.values or columns.rejected in row.values:
        return row, columns
    found = [pair for pair in PAIRS if set(pair) <= row.values.keys()]
    output = row.values.get("output")
    if isinstance(output, list | tuple) and len(output) == 2:
        found.append(("output",))
    scores = [name for name in SCORES if isinstance(row.values.get(name), list | tuple)]
    found += [(name, score) for name in LISTS if isinstance(row.values.get(name), list | tuple) for score in scores]
    if len(found) > 1:
        raise _ambiguous(row, found, "the completions", "data.columns.chosen and data.columns.rejected")
    if not found:
        return row, columns
    if found[0] in PAIRS:
        return row, replace(columns, chosen=found[0][0], rejected=found[0][1])
    best, worst = (0, 1) if len(found[0]) == 1 else _best_and_worst(row, *found[0])
    texts = row.values[found[0][0]]
    names = [f"{found[0][0]}[{position}]" for position in (best, worst)]
    row = Row(row.values | {names[0]: texts[best], names[1]: texts[worst]}, row.location)
    return row, replace(columns, chosen=names[0], rejected=names[1])


def _best_and_worst(row: Row, texts: str, scores: str) -> tuple[int, int]:
    """Positions of the completions with the highest and the lowest rating; those without one are passed over."""
    if len(row.values[texts]) != len(row.values[scores]):
        counts = f"{len(row.values[texts])} {texts}, but {len(row.values[scores])} {scores}"
        raise DataError(f"{row.location}: {counts}; each completion needs one")
    rated = [(_score(row, scores, value), i) for i, value in enumerate(row.values[scores]) if value is not None]
    if not rated or max(rated)[0] == min(rated)[0]:
        reason = "no two completions with different ratings"
        raise UselessPair(f"{row.location}: columns {texts!r} and {scores!r}", reason, reason)
    return max(rated, key=lambda item: item[0])[1], min(rated, key=lambda item: item[0])[1]


def _find_prompt(row: Row, columns: Columns) -> tuple[Row, Columns]:
    if columns.prompt != "prompt" or "prompt" in row.values or _is_whole(row.values.get(columns.chosen)):
        return row, columns
    found = [name for name in PROMPTS if row.values.get(name)]
    if found == ["instruction", "input"] or (found == ["instruction"] and row.values.get("history")):
        joined = _alpaca_prompt(row)
        return Row(row.values | {"instruction": joined}, row.location), replace(columns, prompt="instruction")
    if len(found) > 1:
        raise _ambiguous(row, [(name,) for name in found], "the prompt", "data.columns.prompt")
    return (row, replace(columns, prompt=found[0])) if found else (row, columns)


def _is_whole(completion: Any) -> bool:
    """Whether a completion brings its prompt along."""
    if isinstance(completion, str):
        return is_transcript(completion)
    return isinstance(completion, list | tuple) and len(completion) > 1


def _alpaca_prompt(row: Row) -> str | list[Message]:
    """Instruction and input on lines of their own, after earlier turns."""
    values = row.values
    for name in ("instruction", "input"):
        if not isinstance(values.get(name) or "", str):
            raise DataError(f"{row.location}: column {name!r} must hold text, found {values[name]!r}")
    text = "\n".join(values[name] for name in ("instruction", "input") if values.get(name))
    turns = values.get("history") or []
    whole = isinstance(turns, list | tuple) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns)
    if not whole or not all(isinstance(said, str) for turn in turns for said in turn):
        raise DataError(f"{row.location}: column 'history' must hold a list of [question, answer]{PLAIN}")
    if not turns:
        return text
    earlier = [(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": said} for role, said in [*earlier, ("user", text)]]


def _ambiguous(row: Row, found: Iterable[tuple[str, ...]], what: str, option: str) -> DataError:
    candidates = " or ".join(" with ".join(names) for names in found)
    there = ", ".join(map(str, row.values))
    return DataError(f"{row.location}: {candidates} could hold {what}; set {option}; columns there: {there}")


def _finite(row: Row, column: str, option: str) -> float:
    """The finite number in a column; of a list of scores, the best minus the worst."""
    if column not in row.values:
        raise missing(row, column, f"as data.columns.{option} names it")
    value = row.values[column]
    if isinstance(value, list | tuple) and len(value) >= 2:
        scores = [_score(row, column, item) for item in value if item is not None]
        if len(scores) >= 2:
            return max(scores) - min(scores)
    return _score(row, column, value)


def _score(row: Row, column: str, value: Any) -> float:
    """A finite number; CSV files write it as text."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{row.location}: column {column!r} must hold a finite number, found {value!r}")
    return found

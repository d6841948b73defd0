"""The files that benchmarks of answers read questions from and want answers in: AlpacaEval 2, Arena-Hard.

To add one: write how a row becomes a question and how an answer becomes a row, and name both in FORMATS.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gamma_po.data.columns import Columns
from gamma_po.data.formatting import UNPAIRED_SURROGATE, prompt_of
from gamma_po.data.messages import Prompt, texts_of
from gamma_po.data.sources import Row, iterate_rows
from gamma_po.errors import DataError

SHORT_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of shortuuid, without look-alikes
SHORT_LENGTH = 22
FENCED = re.compile(r"```[^`]*```")


class Question(NamedTuple):
    """Something to answer."""

    prompt: Prompt
    row: Row


class Answer(NamedTuple):
    """What was answered."""

    text: str
    num_tokens: int  # by the model's own tokenizer
    time: float  # seconds since 1970
    cut: bool = False  # at the most tokens allowed, before the model had ended it


class Format(NamedTuple):
    """A benchmark's way of writing questions and answers."""

    question: Callable[[Row], Question]
    record: Callable[[Question, Answer, str], dict[str, Any]]  # (question, answer, generator's name)
    lines: bool  # one JSON object per line; otherwise one list


def read_questions(source: str, name: str, limit: int | None = None) -> list[Question]:
    """Read all questions of a file.

    Args:
        source: see `gamma_po.data.sources.read_rows`.
        name: of the format.
        limit: only the first so many.

    Raises:
        DataError: a row lacks what the format needs, or is not valid Unicode.
    """
    questions = []
    for row in iterate_rows(source):
        try:
            questions.append(FORMATS[name].question(row))
        except DataError as error:
            others = ", ".join(other for other in FORMATS if other != name)
            raise DataError(f"{error}; read as --format {name}, others: {others}") from error
        _check_unicode(questions[-1])
        if limit is not None and len(questions) >= limit:
            break
    return questions


def answers_text(name: str, questions: Sequence[Question], answers: Sequence[Answer], generator: str) -> str:
    """Return the content of the answer file.

    Args:
        name: of the format.
        questions: N.
        answers: N, in the same order.
        generator: what the benchmark shall call the model.
    """
    form = FORMATS[name]
    pairs = zip(questions, answers, strict=True)
    records = [form.record(question, answer, generator) for question, answer in pairs]
    if form.lines:
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"


# --- AlpacaEval ---------------------------------------------------------------------------------------------------


def _alpaca_question(row: Row) -> Question:
    return Question(_text(row, "instruction"), row)


def _alpaca_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """instruction, output, generator; dataset and datasplit as the question has them."""
    values = question.row.values
    kept = {name: values[name] for name in ("dataset", "datasplit") if name in values}
    return {"instruction": values["instruction"], "output": answer.text, "generator": generator, **kept}


# --- Arena-Hard ---------------------------------------------------------------------------------------------------


def _arena_question(row: Row) -> Question:
    _text(row, "question_id")
    turns = row.values.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise DataError(f"{row.location}: column 'turns' must be a list of one turn with content")
    return Question(_text(Row(turns[0], f"{row.location}, turn 1"), "content"), row)


def _arena_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """A line of `model_answer/NAME.jsonl` of Arena-Hard v0.1."""
    key = question.row.values["question_id"]
    return {
        "question_id": key,
        "answer_id": short_id(generator, key, answer.text),
        "model_id": generator,
        "choices": [{"index": 0, "turns": [{"content": answer.text, "token_len": answer.num_tokens}]}],
        "tstamp": answer.time,
        "conv_metadata": style(answer),
    }


def _arena2_question(row: Row) -> Question:
    _text(row, "uid")
    return Question(_text(row, "prompt"), row)


def _arena2_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """A line of `model_answer/NAME.jsonl` of Arena-Hard v2.0."""
    values = question.row.values
    return {
        "uid": values["uid"],
        "ans_id": short_id(generator, values["uid"], answer.text),
        "model": generator,
        "messages": [
            {"role": "user", "content": values["prompt"]},
            {"role": "assistant", "content": {"answer": answer.text}},
        ],
        "tstamp": answer.time,
        "metadata": style(answer),
    }


def style(answer: Answer) -> dict[str, Any]:
    """Return the length and the Markdown that Arena-Hard's style control reads; code blocks do not count.

    >>> style(Answer("# A\\n- **b**\\n```\\n- c\\n```", 9, 0.0))["list_count"]
    {'ordered': 0, 'unordered': 1}
    """
    text = FENCED.sub("``````", answer.text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "token_len": answer.num_tokens,
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def short_id(*parts: str) -> str:
    """Return an identifier in shortuuid's alphabet that depends on its parts alone.

    >>> len(short_id("a", "b"))
    22
    """
    number = int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], "big")
    digits = []
    for _ in range(SHORT_LENGTH):
        number, digit = divmod(number, len(SHORT_ALPHABET))
        digits.append(SHORT_ALPHABET[digit])
    return "".join(reversed(digits))


# --- one's own prompts --------------------------------------------------------------------------------------------


def _plain_question(row: Row) -> Question:
    """A prompt as `fit` reads it, with the columns `system` and `tools`, so that one may use a file of pairs."""
    if "prompt" not in row.values:
        there = ", ".join(map(str, row.values)) or "none"
        needed = "which prompts must have, also those of pairs; rename the one that holds them"
        raise DataError(f"{row.location}: no column 'prompt', {needed}; columns there: {there}")
    if isinstance(row.values["prompt"], str):
        _text(row, "prompt")
    prompt = prompt_of(row, Columns())
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{row.location}: column 'prompt' ends with an assistant message; there is nothing to answer")
    return Question(prompt, row)


def _plain_record(question: Question, answer: Answer, generator: str) -> dict[str, Any]:
    """prompt, completion, generator."""
    return {"prompt": question.row.values["prompt"], "completion": answer.text, "generator": generator}


FORMATS = {
    "alpaca_eval": Format(_alpaca_question, _alpaca_record, lines=False),
    "arena_hard": Format(_arena_question, _arena_record, lines=True),
    "arena_hard_v2": Format(_arena2_question, _arena2_record, lines=True),
    "prompts": Format(_plain_question, _plain_record, lines=True),
}


def _check_unicode(question: Question) -> None:
    if any(UNPAIRED_SURROGATE.search(text) for text in texts_of(question.prompt)):
        raise DataError(f"{question.row.location}: not valid Unicode (an unpaired surrogate)")


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        there = ", ".join(map(str, row.values)) or "none"
        raise DataError(f"{row.location}: column {column!r} must hold text, found {value!r}; columns there: {there}")
    return value

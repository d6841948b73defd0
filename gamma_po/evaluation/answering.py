"""Answer a list of questions in batches, so that an interruption loses one batch at most."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gamma_po.data.tokenization import Template, Tokenization, prompt_ids
from gamma_po.errors import ConfigError, DataError
from gamma_po.evaluation.answer_formats import Answer, Question
from gamma_po.evaluation.generation import UNLIMITED, Sampling, eos_ids, room_for_prompt, sampled_batches
from gamma_po.files import acquired, write_text
from gamma_po.fingerprints import fingerprint

VERSIONS = ("gamma_po", "torch", "transformers", "peft")


def question_ids(
    questions: Sequence[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    template: Template = "auto",
) -> list[Tensor]:
    """Tokenise questions; none is cut.

    Args:
        questions: N.
        model: whose positions limit prompt and answer together.
        tokenizer: the policy's.
        max_new_tokens: kept for the answer.
        template: how a prompt becomes text, as in training.

    Raises:
        ConfigError: no prompt can fit beside an answer of that length, or the tokenizer has no such template.
        DataError: a question is too long for the model.
    """
    room = room_for_prompt(model, max_new_tokens)
    options = Tokenization(template=template, max_prompt_length=UNLIMITED)
    ids = []
    for question in questions:
        try:
            ids.append(prompt_ids(question.prompt, tokenizer, options))
        except DataError as error:
            raise DataError(f"{question.row.location}: {error}") from error
        if len(ids[-1]) > room:
            raise DataError(
                f"{question.row.location}: the prompt is too long: {len(ids[-1])} tokens, and beside an answer of "
                f"sampling.max_new_tokens={max_new_tokens} the model has room for {room}; allowed: fewer of either"
            )
    return ids


def settings_record(
    path: str,
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    generator: str,
    template: Template = "auto",
) -> dict[str, Any]:
    """Return all that the answers depend on, as plain values."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(len(ids).to_bytes(4, "little") + ids.numpy().tobytes())
    return {
        "policy": path,
        "generator": generator,
        "weights": fingerprint(model).digest,
        "prompts": {"number": len(prompts), "sha256": digest.hexdigest()},
        "template": template,
        "sampling": {**asdict(sampling), "top_k": 0, "top_p": 1.0},
        "device": str(model.device.type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS if _installed(name)},
    }


@contextmanager
def sole_writer(partial: Path) -> Iterator[None]:
    """Keep a second process from writing the same answers.

    Args:
        partial: as in `answer_all`.

    Raises:
        ConfigError: another process is writing them.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial.with_name(partial.name + ".lock"))
    if not acquired(lock, blocking=False):
        raise ConfigError(f"{partial}: another process is writing these answers; wait for it, or give another output")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    partial: Path,
    settings: dict[str, Any],
) -> list[Answer]:
    """Answer every prompt; what is in `partial` from an earlier run with the same settings is kept.

    Args:
        model: in eval mode.
        tokenizer: decodes.
        prompts: token ids [n_i] each.
        sampling: how to draw.
        partial: answers so far, a line each after a first line of settings.
        settings: of `settings_record`.

    Raises:
        ConfigError: `partial` is of other settings.
    """
    answers, ends = _read_partial(partial, settings), eos_ids(model)
    lines = [json.dumps(settings), *(_line(i, answer) for i, answer in answers.items())]
    write_text(partial, "".join(line + "\n" for line in lines))  # without a line that was cut
    with partial.open("a", encoding="utf-8") as file:
        for batch, rows in sampled_batches(model, prompts, sampling, description="answering", done=answers):
            for i, ids in zip(batch, rows, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                length = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
                cut = len(ids) >= sampling.max_new_tokens and int(ids[-1]) not in ends
                answers[i] = Answer(text, length, time.time(), cut)
                file.write(_line(i, answers[i]) + "\n")
            file.flush()
    return [answers[i] for i in range(len(prompts))]


def _read_partial(partial: Path, settings: dict[str, Any]) -> dict[int, Answer]:
    """The answers of an earlier run; a last line that was cut is left out."""
    if not partial.is_file():
        return {}
    header, *lines = partial.read_text(encoding="utf-8").split("\n")
    try:
        found = json.loads(header)
        rows = [json.loads(line) for line in lines[:-1]]  # what follows the last line end is cut, or nothing
        answers = {row["i"]: Answer(row["text"], row["num_tokens"], row["time"], row["cut"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        message = f"{partial}: not the answers of an interrupted run: {error}; delete it to start anew"
        raise ConfigError(message) from error
    different = [name for name in settings if found.get(name) != settings[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"{partial} holds the answers of an interrupted run with other settings: {name} was {found.get(name)!r}, "
            f"is {settings[name]!r}; give the same settings, or delete it to start anew"
        )
    return answers


def _line(index: int, answer: Answer) -> str:
    return json.dumps({"i": index, **answer._asdict()}, ensure_ascii=False)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

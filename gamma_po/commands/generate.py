"""Write a policy's answers in the format of a benchmark, or chat with it in the terminal."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from gamma_po.commands.arguments import guarded, parse, short_path
from gamma_po.data.tokenization import Template
from gamma_po.errors import ConfigError, require
from gamma_po.evaluation.answer_formats import answers_text, read_questions
from gamma_po.evaluation.answering import answer_all, question_ids, settings_record
from gamma_po.evaluation.chat import Conversation
from gamma_po.evaluation.generation import Sampling
from gamma_po.files import write_text
from gamma_po.saved import SavedPolicy, on_device, open_policy, template_of

HELP = "an empty line sends nothing; /reset forgets the conversation, /exit or Ctrl-D ends it"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to generate.

    Args:
        policy: where the policy is; `--policy PATH` is short for `--policy.path PATH`.
        prompts: json, jsonl, parquet or csv file, `package:NAME/inner/file`, or hub name with an optional `:split`.
        output: the file of answers; nothing is ever replaced. Beside it, `.settings.json` records what they depend on.
        format: of prompts and answers: AlpacaEval 2 (`instruction`), Arena-Hard v0.1 (`question_id`, `turns`) or v2.0
            (`uid`, `prompt`), or one's own prompts (`prompt`: text or messages).
        generator: what the benchmark shall call the policy; by default its path.
        limit: answer only the first so many prompts.
        template: how a prompt becomes text: with the chat template, as it is, or auto; by default as in the policy's
            run, outside of a run auto.
        sampling: how answers are drawn.
        device: e.g. cpu or cuda; by default the GPU where there is one.
        interactive: chat in the terminal instead.
    """

    policy: SavedPolicy
    prompts: str | None = None
    output: str | None = None
    format: Literal["alpaca_eval", "arena_hard", "arena_hard_v2", "prompts"] = "alpaca_eval"
    generator: str | None = None
    limit: int | None = None
    template: Template | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=2048, batch_size=16))
    device: str | None = None
    interactive: bool = False


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    options = parse(GenerateOptions, short_path(arguments, "policy"), "generate", flags=("interactive",))
    return guarded(lambda: chat(options) if options.interactive else generate(options))


def generate(options: GenerateOptions) -> int:
    """Answer all prompts and write the file.

    Raises:
        ConfigError: an option is missing, or the output is there already.
        DataError: a prompt cannot be used.
    """
    if options.prompts is None or options.output is None:
        raise ConfigError("--prompts (a file) and --output (where the answers go) are needed, or --interactive")
    require(options.limit is None or options.limit >= 1, "limit", options.limit, "an integer >= 1, or null for all")
    output = Path(options.output).expanduser()
    if os.path.lexists(output):
        raise ConfigError(f"output={options.output!r} is there already, and nothing is replaced; give another name")
    questions = read_questions(options.prompts, options.format, options.limit)
    opened = on_device(open_policy(options.policy), options.device)
    generator = options.generator or Path(options.policy.path).name
    template = options.template or template_of(opened)
    ids = question_ids(questions, opened.model, opened.tokenizer, options.sampling.max_new_tokens, template)
    settings = settings_record(options.policy.path, opened.model, ids, options.sampling, generator, template)
    partial = output.with_name(output.name + ".partial.jsonl")
    answers = answer_all(opened.model, opened.tokenizer, ids, options.sampling, partial=partial, settings=settings)
    write_text(output.with_name(output.name + ".settings.json"), json.dumps(settings, indent=2) + "\n")
    write_text(output, answers_text(options.format, questions, answers, generator))
    partial.unlink()
    cut = sum(answer.num_tokens >= options.sampling.max_new_tokens for answer in answers)
    console = Console(highlight=False)
    console.print(f"{len(answers)} answers written to {output}; {cut} of them reached max_new_tokens")
    return 0


def chat(options: GenerateOptions) -> int:
    """Talk in the terminal until the input ends.

    Raises:
        ConfigError: options that a chat does not read.
    """
    unread = [name for name in ("prompts", "output", "generator", "limit") if getattr(options, name) is not None]
    if unread:
        raise ConfigError(f"--interactive does not use {', '.join(unread)}")
    opened = on_device(open_policy(options.policy), options.device)
    template = options.template or template_of(opened)
    conversation = Conversation(opened.model, opened.tokenizer, options.sampling, template)
    console = Console(highlight=False)
    console.print(f"chat with {options.policy.path}: {HELP}", style="dim")
    while True:
        console.print("you> ", style="bold cyan", end="")
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text in ("/exit", "/quit"):
            console.print()
            return 0
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            console.print("policy> ", style="bold green", end="")
            conversation.answer(text, lambda piece: console.print(piece, end="", markup=False))
            console.print()
            if conversation.forgotten:
                console.print(f"(no room for the first {conversation.forgotten} messages)", style="dim")

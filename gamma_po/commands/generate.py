"""Write a policy's answers in the format of a benchmark, or chat with it in the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from gamma_po.commands.arguments import guarded, new_output, parse, refuse_unread, renamed, short_path
from gamma_po.data.tokenization import Template
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.evaluation.answer_formats import answers_text, read_questions
from gamma_po.evaluation.answering import answer_all, question_ids, settings_record, sole_writer
from gamma_po.evaluation.chat import Conversation
from gamma_po.evaluation.generation import Sampling
from gamma_po.files import write_text
from gamma_po.saved import SavedPolicy, on_device, open_policy, template_of

HELP = "an empty line sends nothing; /reset forgets the conversation, /exit or Ctrl-D ends it"
IN_A_CHAT = {"policy", "template", "sampling", "device", "interactive"}
NAMES = (  # options of `fit` as messages name them, and what they are called here
    ("`data.tokenization.template: ", "`--template "),
    (r"data\.tokenization\.template: ", "--template "),
    (r"data\.tokenization\.template=", "template="),
    (r"columns\.tools: null, which leaves them unread", "prompts without tools"),
    (r"; [^;]*columns\.(tools|system|format): [^;]*", ""),
)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to generate.

    Args:
        policy: where the policy is; `--policy PATH` is short for `--policy.path PATH`.
        prompts: json, jsonl, parquet or csv file, `package:NAME/inner/file`, or hub name with an optional `:split`.
        output: the file of answers; nothing is ever replaced. Beside it, `.settings.json` records what they depend on.
        format: of prompts and answers: AlpacaEval 2 (`instruction`), Arena-Hard v0.1 (`question_id`, `turns`) or v2.0
            (`uid`, `prompt`), or one's own prompts (`prompt`: text or messages).
        generator: what the benchmark shall call the policy; by default the last part of its path.
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
    words = short_path(arguments, "policy")
    options = parse(GenerateOptions, words, "generate", flags=("interactive",), names=NAMES)
    return guarded(lambda: chat(options) if options.interactive else generate(options), names=NAMES)


def generate(options: GenerateOptions) -> int:
    """Answer all prompts and write the file.

    Raises:
        ConfigError: an option is missing, or the output is there already.
        DataError: a prompt cannot be used.
    """
    if options.prompts is None or options.output is None:
        raise ConfigError("--prompts (a file) and --output (where the answers go) are needed, or --interactive")
    require(options.limit is None or options.limit >= 1, "limit", options.limit, "an integer >= 1, or null for all")
    output = new_output(options.output)
    questions = read_questions(options.prompts, options.format, options.limit)
    opened = on_device(open_policy(options.policy), options.device)
    generator = options.generator or Path(options.policy.path).name or options.policy.path
    template = options.template or template_of(opened)
    ids = question_ids(questions, opened.model, opened.tokenizer, options.sampling.max_new_tokens, template)
    settings = settings_record(options.policy.path, opened.model, ids, options.sampling, generator, template)
    partial = output.with_name(output.name + ".partial.jsonl")
    with sole_writer(partial):
        new_output(options.output)  # another process may have finished it meanwhile
        answers = answer_all(opened.model, opened.tokenizer, ids, options.sampling, partial=partial, settings=settings)
        write_text(output.with_name(output.name + ".settings.json"), json.dumps(settings, indent=2) + "\n")
        write_text(output, answers_text(options.format, questions, answers, generator))
        partial.unlink()
    cut = sum(answer.cut for answer in answers)
    text = f"{len(answers)} answers written to {output}; {cut} of them cut at sampling.max_new_tokens"
    Console(highlight=False).print(text, soft_wrap=True, markup=False)
    return 0


def chat(options: GenerateOptions) -> int:
    """Talk in the terminal until the input ends.

    Raises:
        ConfigError: options that a chat does not read.
    """
    defaults = GenerateOptions(policy=options.policy)
    refuse_unread(options, defaults, IN_A_CHAT, "--interactive")
    if options.sampling.batch_size != defaults.sampling.batch_size:
        raise ConfigError("--interactive does not use --sampling.batch_size: a chat answers one message at a time")
    opened = on_device(open_policy(options.policy), options.device)
    template = options.template or template_of(opened)
    conversation = Conversation(opened.model, opened.tokenizer, options.sampling, template)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"chat with {options.policy.path}: {HELP}", style="dim")
    while True:
        console.print("you> ", style="bold cyan", end="")
        line = _line()
        text = line.strip()
        if not line or text in ("/exit", "/quit"):
            console.print()
            return 0
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            _answer(conversation, text, console)


def _line() -> str:
    """The next line of the input; nothing at its end."""
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not valid {error.encoding}: {error.reason}") from error


def _answer(conversation: Conversation, text: str, console: Console) -> None:
    """Show the answer to a message, or why there is none."""
    console.print("policy> ", style="bold green", end="")
    try:
        conversation.answer(text, lambda piece: console.print(piece, end=""))
    except DataError as error:
        console.print(f"({renamed(str(error), NAMES)})", style="dim")
        return
    console.print()
    if conversation.forgotten:
        console.print(f"(no room for the first {conversation.forgotten} messages)", style="dim")

"""Pair accuracy of a policy's implicit rewards, by subset; win rates from a judge's annotations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.console import Console

from gamma_po.commands.arguments import guarded, new_output, parse, refuse_unread, short_path
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.data.tokenization import Template, Tokenization, tokenize_preferences
from gamma_po.errors import ConfigError, require
from gamma_po.evaluation.pair_scores import opened_reference, pair_logps, reference_name, subset_names
from gamma_po.evaluation.report import as_json
from gamma_po.evaluation.subsets import SubsetAccuracy, accuracy_table, reward_margins, subset_accuracies
from gamma_po.evaluation.win_rates import read_annotations, win_rates
from gamma_po.files import write_text
from gamma_po.inspection.show import facts_table
from gamma_po.saved import Opened, SavedPolicy, on_device, open_policy, template_of
from gamma_po.types import Evidence

OF_A_JUDGE = {"annotations", "output"}
NAMES = ((r"\bdata\.(columns|tokenization|invalid_rows)\b", r"\1"),)  # as in messages of `fit`, and as here


def long_texts() -> Tokenization:
    """Lengths at which hardly anything is cut."""
    return Tokenization(max_prompt_length=2048, max_completion_length=2048)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate.

    Args:
        policy: where the policy is; `--policy PATH` is short for `--policy.path PATH`.
        pairs: a preference set: a file, `package:NAME/inner/file` or hub name with an optional `:split`.
        annotations: judge's annotations as AlpacaEval writes them; needs the package alpaca-eval.
        reference: the reference; by default what the policy was trained from.
        reference_free: leave out the rewards that need a reference.
        subset: column that names each pair's subset.
        columns: how the columns are called.
        template: how prompts and completions become text; by default `tokenization.template`, and where that is auto,
            as in the policy's run.
        tokenization: truncation, and a template.
        invalid_rows: what to do with empty completions, identical pairs and the like: stop, or drop and count.
        limit: only the first so many pairs.
        batch_size: completions per forward.
        device: e.g. cpu or cuda; by default the GPU where there is one.
        output: the JSON file for the numbers; nothing is ever replaced.
    """

    policy: SavedPolicy | None = None
    pairs: str | None = None
    annotations: str | None = None
    reference: SavedPolicy | None = None
    reference_free: bool = False
    subset: str | None = None
    columns: Columns = field(default_factory=Columns)
    template: Template | None = None
    tokenization: Tokenization = field(default_factory=long_texts)
    invalid_rows: Literal["error", "drop"] = "error"
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    output: str | None = None


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    words = short_path(short_path(arguments, "policy"), "reference")
    options = parse(EvaluateOptions, words, "evaluate", flags=("reference_free",), names=NAMES)
    return guarded(lambda: evaluate(options), names=NAMES)


def evaluate(options: EvaluateOptions) -> int:
    """Measure what the options ask for, print it, and write it if there is an output.

    Raises:
        ConfigError: nothing to measure is named, or something cannot be loaded.
        DataError: the pairs or annotations cannot be used.
    """
    if (options.pairs is None) == (options.annotations is None):
        raise ConfigError("give either --pairs (a preference set) or --annotations (of a judge)")
    require(options.batch_size >= 1, "batch_size", options.batch_size, "an integer >= 1")
    output = None if options.output is None else new_output(options.output)
    console = Console(highlight=False, markup=False)
    result = pair_accuracies(options, console) if options.pairs is not None else judge_win_rates(options, console)
    if output is not None:
        write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written to {output}", soft_wrap=True)
    return 0


def judge_win_rates(options: EvaluateOptions, console: Console) -> dict[str, Any]:
    """Compute and print win rates."""
    refuse_unread(options, EvaluateOptions(), OF_A_JUDGE, "--annotations")
    annotations = read_annotations(options.annotations)
    rates = win_rates(annotations)
    title = f"{annotations[0]['generator_2']} against {annotations[0]['generator_1']}"
    console.print(facts_table(title, [(key.replace("_", " "), f"{value:.2f}") for key, value in rates.items()]))
    return rates


def pair_accuracies(options: EvaluateOptions, console: Console) -> dict[str, Any]:
    """Score the pairs under policy and reference, and print accuracies."""
    if options.policy is None:
        raise ConfigError("--policy is needed: a run directory, a .ckpt file, an exported adapter or model, or a model")
    if options.reference_free and options.reference is not None:
        raise ConfigError("--reference_free does not use --reference")
    preferences, dropped = read_preferences(
        options.pairs, options.columns, invalid_rows=options.invalid_rows, limit=options.limit
    )
    subsets = subset_names(options.pairs, options.subset, {preference.location for preference in preferences})
    opened = on_device(open_policy(options.policy), options.device)
    tokenization = tokenization_of(options, opened)
    pairs, kept, counts = tokenize_preferences(preferences, opened.tokenizer, tokenization)
    policy, reference = pair_logps(opened.model, pairs, options.batch_size, "the policy"), None
    against = None if options.reference_free else reference_name(opened, options.reference)
    if not options.reference_free:
        with opened_reference(opened, options.reference) as model:
            reference = pair_logps(model, pairs, options.batch_size, "the reference")
    names = [subsets[preferences[i].location] for i in kept]
    rows = subset_accuracies(reward_margins(Evidence(policy, reference)), names, [preferences[i].prompt for i in kept])
    console.print(accuracy_table(rows))
    noted = {**dropped, **{key: number for key, number in counts.items() if number}}
    found = ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in noted.items())
    console.print(f"{options.pairs}: {found}; template {tokenization.template}", soft_wrap=True)
    if against is not None:
        console.print(f"reference: {against}", soft_wrap=True)
    settings = {"template": tokenization.template, "reference": against}
    return {"accuracies": [as_plain(row) for row in rows], "counts": noted, "settings": settings}


def tokenization_of(options: EvaluateOptions, opened: Opened) -> Tokenization:
    """Return how text becomes tokens, with the template of the policy's run where none is given.

    Raises:
        ConfigError: two different templates are given.
    """
    given = options.tokenization.template
    agree = options.template is None or given in ("auto", options.template)
    require(agree, "template", options.template, f"{given}, as tokenization.template says, or only one of them")
    if options.template is None and given == "auto":
        return replace(options.tokenization, template=template_of(opened))
    return replace(options.tokenization, template=options.template or given)


def as_plain(row: SubsetAccuracy) -> dict[str, Any]:
    """Return a row as plain values."""
    return {**row._asdict(), "accuracy": {name: as_json(value) for name, value in row.accuracy.items()}}

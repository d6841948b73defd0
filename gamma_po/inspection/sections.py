"""The sections of an inspection: each returns what to show, and what it found."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from gamma_po.errors import ConfigError, DataError
from gamma_po.evaluation.intervals import Estimate
from gamma_po.inspection.cost import Memory
from gamma_po.inspection.findings import Finding
from gamma_po.inspection.pairs import REPEATS, Ends, data_findings, ends, lengths, split_findings
from gamma_po.inspection.reference_accuracy import ReferenceAccuracy
from gamma_po.inspection.show import duration, facts_table, length_table, size
from gamma_po.margins.base import strength

FEW_STEPS = 10
HIGH_RATE = 0.01  # no published preference optimization of a language model comes near


def loss_rows(module: Any) -> list[tuple[str, str]]:
    """Return loss and margin: options, formula, units, paper."""
    loss, margin = module.loss, module.margin
    rows = [
        ("loss", f"{loss}\n{loss.formula}\n{loss.source}"),
        ("margin", f"{margin}\n{margin.formula}\n{margin.source}"),
        (
            "units",
            "rewards, h and γ in reward units: what the loss calls reward, β included; log-probabilities in nats",
        ),
    ]
    ratio = strength(margin)
    if ratio is not None:
        rows.append(("γ0/τ", f"{ratio:.4g}: in a pool, the largest γ is at most {math.exp(ratio):.4g} × the smallest"))
    rows.append(("reference", "not used" if module.reference is None else module.reference.source))
    return rows


def show_data(datamodule: Any, tokenizer: Any, total: int, console: Console) -> list[Finding]:
    """Print lengths and counts of the training split, and judge them.

    Args:
        datamodule: set up.
        tokenizer: the policy's.
        total: pairs that the run will have.
        console: where to print.
    """
    dataset = datamodule.datasets["train"]
    marks = ends(dataset.pairs, tokenizer)
    console.print(length_table(lengths(dataset.pairs)))
    sizes = {name: len(data) for name, data in datamodule.datasets.items()}
    rows = [(f"pairs, {name}", f"{n} from {source_text(datamodule.sources[name])}") for name, n in sizes.items()]
    if total > len(dataset):
        rows.append(("looked at", f"{len(dataset)} of about {total} training pairs (inspect.max_pairs)"))
    console.print(facts_table("the data", rows + count_rows(datamodule, marks)))
    dropped = {name for name in REPEATS if getattr(datamodule.rules, name) == "drop"}
    found = data_findings(dataset, datamodule.counts["train"], marks, dropped=dropped)
    return found + split_findings(datamodule.counts, sizes)


def source_text(source: Any) -> str:
    """Return a source, or several, for a reader."""
    return source if isinstance(source, str) else ", ".join(f"{part.path} × {part.weight:g}" for part in source)


def count_rows(datamodule: Any, marks: Ends) -> list[tuple[str, str]]:
    """Return what was counted in the training split."""
    dataset, counts = datamodule.datasets["train"], datamodule.counts["train"]
    flipped = f"{int(dataset.flipped.sum())} of {len(dataset)} labels flipped"
    repeated = ", ".join(f"{counts.get(name, 0)} pairs {meaning}" for name, meaning in REPEATS.items())
    return [
        ("counts, train", ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in counts.items())),
        ("repeats", repeated),
        ("label noise", f"{flipped} (data.label_noise={datamodule.label_noise:g}, seed {datamodule.label_noise_seed})"),
        ("beginnings", f"{marks.double_bos} prompts with two BOS, {marks.missing_bos} without one that they need"),
        ("ends", f"{marks.unended} of {2 * len(dataset)} completions without an end, {marks.double_eos} with two"),
    ]


def policy_rows(module: Any) -> list[tuple[str, str]]:
    """Return what is trained, and how."""
    parameters = list(module.policy.parameters())
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    mode = "all weights" if module.lora is None else str(module.lora)
    return [
        ("policy", f"{module.policy_config.path} ({module.policy_config.dtype})"),
        ("trained", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {mode}"),
    ]


def settings_findings(module: Any, datamodule: Any) -> list[Finding]:
    """Judge settings that only the loaded model and the data together can show to be wrong.

    Raises:
        DataError: the margin cannot take a row's number, so that no step can be tried.
    """
    datamodule.check_column(module.margin)
    findings = []
    if datamodule.columns.margin is not None and not module.margin.reads_column:
        problem = f"data.columns.margin={datamodule.columns.margin!r} is not read by the margin {module.margin.name}"
        change = "unset data.columns.margin, or take the margin Column, or Reverse or Shuffled around it"
        findings.append(Finding("fails", problem, change))
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in datamodule.datasets["train"].pairs)
    most = getattr(module.policy.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        problem = f"the longest sequence has {longest} tokens, the model's positions end at {most}"
        findings.append(Finding("likely wrong", problem, "lower data.tokenization's limits"))
    rate = module.optimizer_factory([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    if float(rate) >= HIGH_RATE:
        change = "model.optimizer.lr: about 1e-6 to 1e-5 for all weights, 1e-5 to 5e-4 for LoRA"
        findings.append(Finding("likely wrong", f"the learning rate is {float(rate):g}", change))
    return findings


def accuracy_rows(found: ReferenceAccuracy) -> list[tuple[str, str]]:
    """Return the reference's accuracy with its intervals."""
    rows: list[tuple[str, Estimate]] = [
        ("ref_acc, raw", found.raw),
        ("ref_acc, length-normalised", found.length_normalised),
        ("chosen is longer", found.chosen_longer),
    ]
    number = f"{found.num_pairs} pairs of the training split, as labelled; 95 % intervals"
    return [("sample", number), *((name, str(estimate)) for name, estimate in rows)]


class Plan(NamedTuple):
    """How often what happens in a run."""

    batches: int  # micro-batches of an epoch and process
    steps: int  # optimizer steps
    accumulate: int  # micro-batches per step
    processes: int
    pairs_to_score: int  # by the reference, over all splits


def plan(trainer: Any, datamodule: Any, total: int) -> Plan:
    """Return the plan of a run.

    Args:
        trainer: of the run.
        datamodule: set up.
        total: training pairs.

    Raises:
        DataError: the pairs are fewer than one global batch.
        ConfigError: the number of steps is not limited.
    """
    batches = total // (datamodule.batch_size * trainer.world_size)
    if batches == 0:
        raise DataError(
            f"the training split has {total} pairs, fewer than one global batch of {datamodule.batch_size} × "
            f"{trainer.world_size} ranks; lower data.batch_size or give more pairs"
        )
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    most = trainer.max_steps if trainer.max_steps != -1 else math.inf
    if math.isinf(epochs) and math.isinf(most):
        raise ConfigError("the schedule needs a known number of steps: set trainer.max_steps or trainer.max_epochs")
    accumulate = trainer.accumulate_grad_batches
    held_out = sum(len(data) for name, data in datamodule.datasets.items() if name != "train")
    steps = int(min(epochs * math.ceil(batches / accumulate), most))
    return Plan(batches, steps, accumulate, trainer.world_size, total + held_out)


def plan_findings(planned: Plan) -> list[Finding]:
    """Judge how much training there will be."""
    if planned.steps >= FEW_STEPS:
        return []
    return [Finding("note", f"only {planned.steps} optimizer steps", "more epochs, or a smaller data.batch_size")]


def time_rows(planned: Plan, batch_size: int, step: float | None, per_pair: float | None) -> list[tuple[str, str]]:
    """Return what takes how long.

    Args:
        planned: how often.
        batch_size: pairs per micro-batch.
        step: of one micro-batch, forward to optimizer, [s]; None where it was not tried.
        per_pair: of one pair under the reference, [s]; None where the run needs no cached reference.
    """
    pairs = batch_size * planned.processes * planned.accumulate
    rows = [("steps", f"{planned.steps} of {pairs} pairs each")]
    if step is None:
        return [*rows, ("a micro-batch", "not tried: it would not fit")]
    where = ", measured on one process" if planned.processes > 1 else ""
    rows += [
        ("a micro-batch", f"{duration(step)} ({batch_size} pairs{where})"),
        ("an epoch of training", duration(step * planned.batches)),
        ("the whole training", duration(step * planned.steps * planned.accumulate)),
    ]
    if per_pair is not None:
        scoring = per_pair * planned.pairs_to_score / planned.processes
        rows.append(("reference, once", f"{duration(scoring)}, unless it is cached already"))
    return rows


def memory_rows(memory: Memory, free: int) -> list[tuple[str, str]]:
    """Return what holds how much, and what there is."""
    parts = [(name, size(number)) for name, number in memory._asdict().items() if number]
    holes = [("holes in the heap, besides", f"up to {size(memory.holes)}")] if memory.holes else []
    return [*parts, ("together", size(memory.total)), *holes, ("free on this machine", size(free))]

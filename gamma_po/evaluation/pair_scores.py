"""Score preference pairs under a policy and under the reference it was trained from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from gamma_po.data.columns import missing
from gamma_po.data.sources import iterate_rows
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError, DataError
from gamma_po.evaluation.on_policy import score_completions
from gamma_po.policies import ModelConfig, adapters_off, load_model
from gamma_po.runs import run_config
from gamma_po.saved import Opened, SavedPolicy, from_plain, open_policy
from gamma_po.scorer import CompletionScorer
from gamma_po.types import PairLogps


def pair_logps(model: PreTrainedModel, pairs: Sequence[TokenizedPair], batch_size: int, who: str) -> PairLogps:
    """Return log-probabilities of all pairs, [N] each, on the CPU.

    Args:
        model: in eval mode.
        pairs: N.
        batch_size: completions per forward.
        who: the model, for the progress bar.
    """
    scorer, prompts = CompletionScorer(model), [pair.prompt for pair in pairs]
    sides: list[Tensor] = []
    lengths: list[Tensor] = []
    for side in ("chosen", "rejected"):
        completions = [getattr(pair, side) for pair in pairs]
        description = f"{side} under {who}"
        sides.append(score_completions(scorer, prompts, completions, batch_size=batch_size, description=description))
        lengths.append(torch.tensor([len(completion) for completion in completions]))
    return PairLogps(sides[0], sides[1], lengths[0], lengths[1])


@contextmanager
def opened_reference(opened: Opened, named: SavedPolicy | None) -> Iterator[PreTrainedModel]:
    """Give the frozen reference: the one that is named, or what the policy was trained against.

    That is the `reference_model` of its checkpoint or run if there is one, the policy with its adapters off, or the
    model that training started from.

    Args:
        opened: the policy.
        named: another reference.

    Raises:
        ConfigError: none is named, and it is not known what the policy was trained from.
    """
    trained_against = _reference_model(opened)
    if named is not None:
        yield open_policy(named).model.to(opened.model.device)
    elif trained_against is not None:
        yield _loaded(from_plain(ModelConfig, trained_against), opened)
    elif isinstance(opened.model, PeftModel):
        with adapters_off(opened.model):
            yield opened.model
    elif opened.start is not None:
        yield _loaded(opened.start, opened)
    else:
        raise ConfigError(
            "it is not known what this policy was trained from: name it with --reference PATH, or leave out the "
            "rewards that need it with --reference_free"
        )


def reference_name(opened: Opened, named: SavedPolicy | None) -> str:
    """Say which reference `opened_reference` gives."""
    trained_against = _reference_model(opened)
    if named is not None:
        return named.path
    if trained_against is not None:
        return str(trained_against["path"])
    if not isinstance(opened.model, PeftModel):
        return "not known" if opened.start is None else opened.start.path
    known = opened.hyper_parameters or opened.run is not None
    where = "" if known else "; the adapter lies outside of its run, which may have had another: then give --reference"
    return f"the policy without its adapter{where}"


def subset_names(source: str, column: str | None, locations: set[str]) -> dict[str, str]:
    """Return the subset of each row by its location; one name for all where no column is named.

    Args:
        source: of the rows.
        column: that names the subset, or None.
        locations: of the rows that count.

    Raises:
        DataError: a row lacks the column, or what it holds.
    """
    if column is None:
        return dict.fromkeys(locations, "all pairs")
    names: dict[str, str] = {}
    for row in iterate_rows(source):
        if row.location in locations:
            if column not in row.values:
                raise missing(row, column)
            if row.values[column] is None:
                raise DataError(f"{row.location}: column {column!r} holds null; allowed: the name of a subset")
            names[row.location] = str(row.values[column])
        if len(names) == len(locations):
            break
    return names


def _reference_model(opened: Opened) -> dict[str, Any] | None:
    """The settings of a reference of its own; an exported policy has them in the `config.yaml` of its run."""
    settings = opened.hyper_parameters
    if not settings and opened.run is not None:
        settings = run_config(opened.run).get("model") or {}
    return settings.get("reference_model")


def _loaded(config: ModelConfig, opened: Opened) -> PreTrainedModel:
    """A reference on the policy's device; that a checkpoint trusts code from elsewhere does not count."""
    return load_model(replace(config, trust_remote_code=False)).to(opened.model.device)

"""Which pairs of which sources a split has: mixing with weights, holding prompts out, duplicates, contradictions."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from gamma_po.data.columns import Columns
from gamma_po.data.noise import uniform
from gamma_po.data.pair_files import Chosen, PairFile
from gamma_po.errors import ConfigError, DataError, require

log = logging.getLogger(__name__)

Treatment = Literal["keep", "drop", "error"]
Part = Literal["all", "train", "validation"]
KEYS = ("prompt_key", "chosen_key", "rejected_key")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several sources of training pairs.

    Args:
        path: file, `package:NAME/inner/file` or hub name.
        weight: how often each of its pairs comes per epoch, > 0: 2 is twice; 0.5 is a seeded half of them, once;
            1.5 is each once and a seeded half once more.
        limit: only its first so many pairs.
        columns: how its columns are called, where that differs from `data.columns`.
    """

    path: str
    weight: float = 1.0
    limit: int | None = None
    columns: Columns | None = None

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path} (weight {self.weight:g})"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which pairs are taken.

    Args:
        duplicates: pairs whose three texts are those of an earlier pair: keep them, drop them, or stop.
        contradictions: pairs whose reverse is there too (A over B and B over A for one prompt): keep, drop both
            sides, or stop.
        validation_share: of the prompts to hold out, in [0, 1). Whether a prompt is held out is a function of seed and
            prompt, so all its pairs are on the same side, whatever else the sources hold.
        seed: of the held-out prompts and of weights that are not whole numbers.

    Raises:
        ConfigError: a value is not allowed.
    """

    duplicates: Treatment = "keep"
    contradictions: Treatment = "keep"
    validation_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duplicates", "contradictions"):
            value = getattr(self, name)
            require(value in get_args(Treatment), f"data.{name}", value, ", ".join(get_args(Treatment)))
        allowed = 0 <= self.validation_share < 1
        require(allowed, "data.validation_share", self.validation_share, "a share of the prompts in [0, 1)")


class Sources(tuple[Source, ...]):
    """Several sources, of which messages speak as they speak of one."""

    def __str__(self) -> str:
        return " + ".join(map(str, self))


class Split(NamedTuple):
    """The pairs of a split, on disk."""

    pairs: Chosen  # [N] TokenizedPair
    preferences: Chosen  # [N] Preference
    column: Tensor  # [N] float32, the margin column; NaN where none is read
    origin: Tensor  # [N] int64, equal where a weight repeats a pair
    prompt_keys: np.ndarray  # [N] int64
    counts: dict[str, int]


def as_sources(given: str | Sequence[Source], limit: int | None) -> Sources:
    """Return the sources of an option that may name one, each with the lower of its own limit and the common one.

    Raises:
        ConfigError: the list is empty.
    """
    if isinstance(given, str):
        return Sources((Source(path=given, limit=limit),))
    require(len(given) > 0, "data.train", list(given), "a source, or a list of at least one")
    limits = [[n for n in (source.limit, limit) if n is not None] for source in given]
    return Sources(replace(source, limit=min(n, default=None)) for source, n in zip(given, limits, strict=True))


def check_sources(training: object, columns: Columns) -> None:
    """Check the sources of a list, here and not where they are made: there the parser would bury what is wrong.

    Raises:
        ConfigError: a value is not allowed, or some sources have a margin column and others have not.
    """
    for source in training if isinstance(training, Sources) else ():
        allowed = 0 < source.weight < math.inf
        require(allowed, f"data.train, weight of {source.path}", source.weight, "a finite number > 0")
        good = source.limit is None or source.limit >= 1
        require(good, f"data.train, limit of {source.path}", source.limit, "an integer >= 1, or null")
        own = source.columns or columns
        if (own.margin is None) != (columns.margin is None):
            raise ConfigError(
                f"data.train: {source.path} has columns.margin={own.margin!r}, data.columns.margin="
                f"{columns.margin!r}; allowed: a margin column for every source and in data.columns, or for none"
            )


def sources_of_splits(
    train: str | Sequence[Source] | None, validation: str | None, test: str | None, rules: Rules, columns: Columns
) -> dict[str, str | Sources | None]:
    """Return what each split is read from: held-out prompts from where training is.

    Raises:
        ConfigError: see `check_sources`; or validation data is given, and a share of training held out, too.
    """
    training = train if train is None or isinstance(train, str) else Sources(train)
    held_out = rules.validation_share > 0
    require(validation is None or not held_out, "data.validation", validation, "null with data.validation_share")
    check_sources(training, columns)
    return {"train": training, "validation": training if held_out else validation, "test": test}


def select(
    files: Sequence[PairFile], weights: Sequence[float], rules: Rules, part: Part = "all", limit: int | None = None
) -> Split:
    """Choose pairs of files, file after file.

    Args:
        files: one per source.
        weights: of each; they count only in training.
        rules: which pairs are taken; "all" parts only have their duplicates and contradictions counted.
        part: all pairs, those for training, or those of held-out prompts.
        limit: of held-out pairs.

    Returns:
        At least one pair.

    Raises:
        DataError: duplicates or contradictions where they must not be, or no pair is left.
    """
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.counts)
    places = np.concatenate([np.stack([np.full(len(f), i), np.arange(len(f))], axis=1) for i, f in enumerate(files)])
    keys = np.concatenate([np.stack([file.numbers(name) for name in KEYS], axis=1) for file in files])
    taken = _distinct(files, places, keys, rules if part != "all" else Rules(), counts)
    if part != "all" and rules.validation_share:
        held_out = _held_out(keys[:, 0], rules)
        counts["held_out_pairs"] = int((taken & held_out).sum())
        taken &= held_out if part == "validation" else ~held_out
    rows = np.flatnonzero(taken)[: limit if part == "validation" else None]
    origin = np.arange(len(rows))
    if part == "train":
        origin = _weighted(places[rows, 0], keys[rows], files, weights, rules.seed)
        rows = rows[origin]
    if not len(rows):
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{', '.join(file.source for file in files)}: no pair is left for {part}: {found}")
    column = np.concatenate([file.numbers("column") for file in files])[rows]
    return Split(
        pairs=Chosen(files, places[rows], "tokens"),
        preferences=Chosen(files, places[rows], "preference"),
        column=torch.from_numpy(column).float(),
        origin=torch.from_numpy(origin),
        prompt_keys=keys[rows, 0],
        counts=dict(counts),
    )


def shared_prompts(split: Split, other: Split) -> int:
    """Return how many different prompts of a split another one has, too."""
    return len(np.intersect1d(split.prompt_keys, other.prompt_keys))


def _distinct(
    files: Sequence[PairFile], places: np.ndarray, keys: np.ndarray, rules: Rules, counts: Counter[str]
) -> np.ndarray:
    """Which pairs are taken, [N] bool; counts and reports duplicates and contradictions."""
    reverse = keys[:, [0, 2, 1]]
    _, ids = np.unique(np.concatenate([keys, reverse]), axis=0, return_inverse=True)
    own, turned = ids.reshape(2, -1)
    _, first = np.unique(own, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    contradicted = np.isin(own, turned)
    taken = np.ones(len(keys), dtype=bool)
    for name, found, partner, what in (
        ("duplicates", repeated, own, "repeat an earlier pair"),
        ("contradictions", contradicted, turned, "contradict another pair (A over B, and B over A)"),
    ):
        if not found.any():
            continue
        counts[name] = int(found.sum())
        rows = [np.flatnonzero(found)[0]]
        rows += [i for i in np.flatnonzero(own == partner[rows[0]])[:1] if i != rows[0]]
        example = " and ".join(_location(files, places[i]) for i in sorted(rows))
        message = f"{counts[name]} of {len(keys)} pairs {what}, e.g. {example}"
        treatment = getattr(rules, name)
        if treatment == "error":
            raise DataError(f"{message}; `data.{name}: drop` would drop them")
        log.warning("%s; data.%s: %s", message, name, treatment)
        if treatment == "drop":
            taken &= ~found
    return taken


def _location(files: Sequence[PairFile], place: np.ndarray) -> str:
    return files[place[0]].preference(int(place[1])).location


def _held_out(prompt_keys: np.ndarray, rules: Rules) -> np.ndarray:
    """Which pairs' prompts are held out, [N] bool."""
    prompts, inverse = np.unique(prompt_keys, return_inverse=True)
    drawn = [uniform(f"held out {rules.seed} {prompt}") < rules.validation_share for prompt in prompts.tolist()]
    return np.array(drawn)[inverse]


def _weighted(
    file_of: np.ndarray, keys: np.ndarray, files: Sequence[PairFile], weights: Sequence[float], seed: int
) -> np.ndarray:
    """Positions of the pairs of an epoch, in order, some of them more than once, [M]."""
    positions = []
    for number, weight in enumerate(weights):
        own = np.flatnonzero(file_of == number)
        whole, rest = int(weight), weight - int(weight)
        extra = np.zeros(0, dtype=np.int64)
        if rest:
            drawn = [uniform(f"weight {seed} {key}") for key in map(tuple, keys[own].tolist())]
            extra = own[np.argsort(drawn, kind="stable")[: round(rest * len(own))]]
        chosen = np.sort(np.concatenate([*[own] * whole, extra]))
        if len(own) and not len(chosen):
            raise DataError(f"{files[number].source}: weight {weight:g} leaves none of its {len(own)} pairs")
        positions.append(chosen)
    return np.concatenate(positions).astype(np.int64)

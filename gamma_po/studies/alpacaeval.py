"""Testbed S2: real answers to AlpacaEval's instructions, with its judge's log-odds as the gold reward.

The candidates of an instruction are the responses of the bandit. The policy sees the text's features only. A seed
draws which instructions are held out, which pairs are compared, labels and flips; the answers are always the same, so
intervals are over these draws and not over other instructions. Seeds for tuning draw from instructions of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from gamma_po.errors import DataError
from gamma_po.studies.bandit import RandomFunction
from gamma_po.studies.text_features import standardised, text_features
from gamma_po.studies.worlds import (
    TUNING_SEED,
    HeldOut,
    Worlds,
    draw_worlds,
    generator_of,
    informed_scores,
    preference_pairs,
)

FEWEST_ANSWERS = 4
PARTS = 3  # stream of `generator_of`: which instructions are for tuning
ANNOTATIONS = "weighted_alpaca_eval_gpt4_turbo/annotations.json"
SMALLEST_SHARE = 1e-4  # a preference of 1 is read as odds of 1 to 10,000
COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")


class Answers(NamedTuple):
    """All answers, padded to K per instruction."""

    features: Tensor  # [Q, K, F], 0 where there is no answer
    gold: Tensor  # [Q, K] log-odds of the judge, nats
    exists: Tensor  # [Q, K] bool


@dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """The testbed's numbers.

    Args:
        answers: of all instructions.
        source: where they are from.
        pairs: training pairs, about equally many per training instruction.
        held_out: share of a seed's instructions held out.
        tuning: share of all instructions that tuning seeds, and only they, draw from.
        sharpness, units: of the reference, as in `Bandit`.
        label_gap: labels are Bradley-Terry on this many times the difference of log-odds.
    """

    scope: ClassVar[str] = (
        "Every seed draws pairs, labels and what is held out from the same instructions and answers: the intervals "
        "hold for these, not for other instructions."
    )
    answers: Answers = field(repr=False)
    source: str
    pairs: int = 1024
    held_out: float = 0.4
    tuning: float = 0.3
    sharpness: float = 1.5
    units: int = 32
    label_gap: float = 1.0

    @classmethod
    def read(cls, path: str) -> AlpacaEval:
        """Read pairs from Parquet files, or the results folder of AlpacaEval.

        Raises:
            DataError: nothing to read, a missing column, or too few instructions with several answers.
        """
        scores: dict[str, dict[str, float]] = {}
        for prompt, answer, score in _rows(Path(path).expanduser()):
            scores.setdefault(prompt, {})[answer] = score
        kept = {prompt: found for prompt, found in sorted(scores.items()) if len(found) >= FEWEST_ANSWERS}
        if len(kept) < 20:
            raise DataError(
                f"{path}: {len(kept)} instructions have {FEWEST_ANSWERS} or more scored answers; allowed: at least 20"
            )
        return cls(answers=_answers(kept), source=path)

    def draw(self, seeds: Sequence[int], rhos: Sequence[float]) -> Worlds:
        """Return a world for every seed and ρ."""
        return draw_worlds(seeds, rhos, self._world)

    def _world(self, seed: int, rho: float) -> Worlds:
        generator, own = generator_of(seed), self.instructions(seed)
        order = own[torch.randperm(len(own), generator=generator)]
        features, gold, exists = (values[order] for values in self.answers)
        nuisance = RandomFunction(features, self.units, generator)(features)
        known = gold[exists]
        score = informed_scores((gold - known.mean()) / known.std(), nuisance, rho, self.sharpness)
        reference = torch.log_softmax(score.masked_fill(~exists, -torch.inf), dim=1)
        test = round(self.held_out * len(order))
        rows = torch.arange(self.pairs) % (len(order) - test) + test
        pairs = preference_pairs(features[rows], reference[rows], gold[rows], self.label_gap, generator)
        held_out = HeldOut(*(values[None, :test] for values in (features, reference, gold)))
        return Worlds(pairs, held_out, (seed,), (rho,))

    def instructions(self, seed: int) -> Tensor:
        """Return which instructions a seed draws from: those for tuning, or all others."""
        parts = torch.randperm(len(self.answers.gold), generator=generator_of(0, PARTS))
        tuning = round(self.tuning * len(parts))
        return parts[:tuning] if seed >= TUNING_SEED else parts[tuning:]


def _answers(scores: dict[str, dict[str, float]]) -> Answers:
    most = max(map(len, scores.values()))
    flat = torch.tensor([text_features(prompt, answer) for prompt, found in scores.items() for answer in found])
    parts = standardised(flat).split([len(found) for found in scores.values()])
    features = torch.stack([torch.cat([part, part.new_zeros(most - len(part), part.shape[1])]) for part in parts])
    gold = torch.zeros(len(scores), most)
    exists = torch.zeros(len(scores), most, dtype=torch.bool)
    for row, found in enumerate(scores.values()):
        gold[row, : len(found)] = torch.tensor(list(found.values()))
        exists[row, : len(found)] = True
    return Answers(features, gold, exists)


def _rows(path: Path) -> Iterator[tuple[str, str, float]]:
    """Instruction, answer, log-odds."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if path.is_dir() and not files:
        yield from _annotations(path)
        return
    for file in files:
        if not file.is_file() or file.suffix != ".parquet":
            raise DataError(
                f"{file}: allowed: a Parquet file of pairs, a folder of them, or AlpacaEval's results folder"
            )
        names = pq.read_schema(file).names
        if missing := [name for name in COLUMNS if name not in names]:
            raise DataError(f"{file}: no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
        for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist():
            yield row["prompt"], row["chosen"], row["score_chosen"]
            yield row["prompt"], row["rejected"], row["score_rejected"]


def _annotations(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Read every model's annotations: `preference` is 1 + P(the model's answer beats the baseline's)."""
    files = sorted(folder.glob(f"*/{ANNOTATIONS}"))
    if not files:
        raise DataError(f"{folder}: neither Parquet files nor */{ANNOTATIONS} are in it")
    for file in files:
        for number, row in enumerate(json.loads(file.read_text())):
            share = row.get("preference")
            if share is None:  # the judge gave no answer
                continue
            if not 1 <= share <= 2:
                raise DataError(f"{file}, row {number}: preference={share} is not allowed; allowed: 1 to 2")
            share = min(max(share - 1, SMALLEST_SHARE), 1 - SMALLEST_SHARE)
            yield row["instruction"], row["output_2"], math.log(share / (1 - share))

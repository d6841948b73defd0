"""Testbed S1: a softmax bandit whose gold reward is known, so that every result is an exact sum.

16 responses per prompt with 16 features each; the gold reward is a random non-linear function, and the
reference is softmax(1.5 (ρ gold + sqrt(1 - ρ²) nuisance)): ρ sets how often it orders a pair correctly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po.studies.worlds import (
    HeldOut,
    Worlds,
    draw_worlds,
    generator_of,
    informed_scores,
    preference_pairs,
)


@dataclass(frozen=True, kw_only=True)
class Bandit:
    """The testbed's numbers.

    Args:
        prompts: training prompts, one pair each.
        held_out: held-out prompts.
        responses: per prompt.
        features: per response.
        units: of the random functions that gold reward and nuisance are.
        sharpness: standard deviation of the reference's log-probabilities before normalisation.
        label_gap: labels are Bradley-Terry on this many times the gold gap.
        calibration: further prompts, one pair each, that are neither trained nor measured on.
    """

    scope: ClassVar[str] = ""  # every seed is a world of its own
    prompts: int = 1024
    held_out: int = 256
    responses: int = 16
    features: int = 16
    units: int = 32
    sharpness: float = 1.5
    label_gap: float = 2.0
    calibration: int = 0

    def draw(self, seeds: Sequence[int], rhos: Sequence[float]) -> Worlds:
        """Return a world for every seed and ρ; worlds of one seed share features, gold and random numbers."""
        return draw_worlds(seeds, rhos, self._world)

    def _world(self, seed: int, rho: float) -> Worlds:
        generator = generator_of(seed)
        prompts = self.prompts + self.held_out
        features = torch.randn(prompts, self.responses, self.features, generator=generator)
        gold_reward, nuisance_reward = (RandomFunction(features, self.units, generator) for _ in range(2))
        gold = gold_reward(features)
        reference = self._reference(gold, nuisance_reward(features), rho)
        train, test = slice(0, self.prompts), slice(self.prompts, None)
        pairs = preference_pairs(features[train], reference[train], gold[train], self.label_gap, generator)
        held_out = HeldOut(*(values[test][None] for values in (features, reference, gold)))
        if not self.calibration:
            return Worlds(pairs, held_out, (seed,), (rho,))
        further = torch.randn(self.calibration, self.responses, self.features, generator=generator)
        gold = gold_reward(further)
        reference = self._reference(gold, nuisance_reward(further), rho)
        calibration = preference_pairs(further, reference, gold, self.label_gap, generator)
        return Worlds(pairs, held_out, (seed,), (rho,), calibration)

    def _reference(self, gold: Tensor, nuisance: Tensor, rho: float) -> Tensor:
        return torch.log_softmax(informed_scores(gold, nuisance, rho, self.sharpness), dim=1)


class RandomFunction:
    """Σ_j a_j tanh(w_j·x + b_j), standardised over the responses that it is drawn for.

    The weights are drawn so that w_j·x has standard deviation 1.5: curved, and not saturated.

    Args:
        features: of those responses, [..., F].
        units: how many terms.
        generator: of the draws.
    """

    def __init__(self, features: Tensor, units: int, generator: torch.Generator) -> None:
        size = features.shape[-1]
        self.weight = torch.randn(size, units, generator=generator) * (1.5 / math.sqrt(size))
        self.bias, self.out = torch.randn(units, generator=generator), torch.randn(units, generator=generator)
        value = self._raw(features)
        self.mean, self.std = value.mean(), value.std()

    def __call__(self, features: Tensor) -> Tensor:
        """Return the function's values, [..., F] -> [...]."""
        return (self._raw(features) - self.mean) / self.std

    def _raw(self, features: Tensor) -> Tensor:
        return (torch.tanh(features @ self.weight + self.bias) * self.out).sum(-1)

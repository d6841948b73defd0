"""Testbed S1: a softmax bandit whose gold reward is known, so that every result is an exact sum.

16 responses per prompt with 16 features each; the gold reward is a random non-linear function, and the
reference is softmax(1.5 (ρ gold + sqrt(1 - ρ²) nuisance)): ρ sets how often it orders a pair correctly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.studies.worlds import HeldOut, Worlds, joined, preference_pairs


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
    """

    prompts: int = 1024
    held_out: int = 256
    responses: int = 16
    features: int = 16
    units: int = 32
    sharpness: float = 1.5
    label_gap: float = 2.0

    def draw(self, seeds: Sequence[int], rhos: Sequence[float]) -> Worlds:
        """Return a world for every seed and ρ; worlds of one seed share features, gold and random numbers."""
        for rho in rhos:
            require(0 <= rho <= 1, "rho", rho, "0 <= ρ <= 1")
        return joined([self._world(seed, rho) for seed in seeds for rho in rhos])

    def _world(self, seed: int, rho: float) -> Worlds:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
        prompts = self.prompts + self.held_out
        features = torch.randn(prompts, self.responses, self.features, generator=generator)
        gold, nuisance = (random_function(features, self.units, generator) for _ in range(2))
        reference = torch.log_softmax(self.sharpness * (rho * gold + math.sqrt(1 - rho**2) * nuisance), dim=1)
        train, test = slice(0, self.prompts), slice(self.prompts, None)
        pairs = preference_pairs(features[train], reference[train], gold[train], self.label_gap, generator)
        held_out = HeldOut(*(values[test][None] for values in (features, reference, gold)))
        return Worlds(pairs, held_out, (seed,), (rho,))


def random_function(features: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Return Σ_j a_j tanh(w_j·x + b_j), standardised over all responses; [..., F] -> [...].

    The weights are drawn so that w_j·x has standard deviation 1.5: curved, and not saturated.
    """
    size = features.shape[-1]
    weight = torch.randn(size, units, generator=generator) * (1.5 / math.sqrt(size))
    bias, out = torch.randn(units, generator=generator), torch.randn(units, generator=generator)
    value = (torch.tanh(features @ weight + bias) * out).sum(-1)
    return (value - value.mean()) / value.std()

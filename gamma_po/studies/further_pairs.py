"""What held-out pairs are worth as training pairs: worlds that train on them, beside their own pairs or instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gamma_po.errors import ConfigError
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.worlds import Pairs, Worlds


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """A testbed whose calibration pairs are trained on; held-out prompts stay as they are.

    Args:
        testbed: with calibration pairs.
        own: whether its training pairs are trained on, too.
        clean: how many of the calibration pairs, the first of them, with labels that are never flipped.
        noisy: how many, the first of them, with labels flipped like those of its training pairs.
    """

    scope: ClassVar[str] = ""
    testbed: Bandit
    own: bool = True
    clean: int = 0
    noisy: int = 0

    def __post_init__(self) -> None:
        """Refuse more pairs than there are, and none."""
        if not self.clean + self.noisy > 0 or max(self.clean, self.noisy) > self.testbed.calibration:
            raise ConfigError(
                f"clean={self.clean}, noisy={self.noisy} is not allowed; allowed: one of them above 0, and up to the "
                f"testbed's calibration={self.testbed.calibration}"
            )

    def draw(self, seeds: Sequence[int], rhos: Sequence[float]) -> Worlds:
        """Return a world for every seed and ρ."""
        worlds = self.testbed.draw(seeds, rhos)
        further = worlds.calibration
        assert further is not None, "the testbed has calibration pairs"
        parts = [worlds.pairs] if self.own else []
        if self.clean:
            first = _first(further, self.clean)
            parts.append(first._replace(coin=torch.ones_like(first.coin)))  # above every flip rate
        if self.noisy:
            parts.append(_first(further, self.noisy))
        pairs = Pairs(*(torch.cat(field, dim=1) for field in zip(*parts, strict=True)))
        return Worlds(pairs, worlds.held_out, worlds.seed, worlds.rho)


def _first(pairs: Pairs, count: int) -> Pairs:
    return Pairs(*(field[:, :count] for field in pairs))

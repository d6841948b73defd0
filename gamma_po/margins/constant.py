"""Margins that are the same for every pair: none and fixed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po.errors import require
from gamma_po.losses.base import Loss
from gamma_po.margins.base import GammaBetaRatio, Margin, in_reward_units, reward_units_of
from gamma_po.ranks import Ranks
from gamma_po.types import Evidence


@dataclass(frozen=True, kw_only=True)
class NoMargin(Margin):
    """γ = 0: the base loss."""

    name: ClassVar[str] = "none"
    formula: ClassVar[str] = "γ = 0"
    source: ClassVar[str] = "the base loss"
    is_constant: ClassVar[bool] = True

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Zeros."""
        return torch.zeros_like(reward_margin.detach()), state


@dataclass(frozen=True, kw_only=True)
class Fixed(Margin):
    """γ = constant.

    Args:
        gamma: γ, reward units; or `GammaBetaRatio`, γ divided by the loss's β.

    Source:
        SimPO, arXiv 2405.14734, eq. 6 (with a reference-free reward); the `fixed` ablation of γ-PO.
    """

    name: ClassVar[str] = "fixed"
    formula: ClassVar[str] = "γ = constant"
    source: ClassVar[str] = "arXiv 2405.14734"
    is_constant: ClassVar[bool] = True

    gamma: float | GammaBetaRatio = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        fits = isinstance(self.gamma, GammaBetaRatio) or math.isfinite(self.gamma)
        require(fits, "fixed.gamma", self.gamma, "a finite number")

    def bind(self, loss: Loss) -> Fixed:
        """Take γ from the loss's β where it is given as a ratio."""
        super().bind(loss)
        gamma = in_reward_units(self, "gamma", loss)
        return self if gamma == self.gamma else dataclasses.replace(self, gamma=gamma)

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """The constant."""
        return torch.full_like(reward_margin.detach(), reward_units_of(self, "gamma")), state

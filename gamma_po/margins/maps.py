"""Monotone maps from a standardised reference margin z to a target margin γ.

Defaults are in units of a z-score: γ is at most 0.02 for a pair of average or lower reference margin (the
linear map excepted) and between 0.5 and 1 two deviations above the average.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gamma_po.errors import require


@dataclass(frozen=True, kw_only=True)
class MapShape(ABC):
    """A non-decreasing map z -> γ, elementwise, γ in reward units."""

    formula: ClassVar[str]

    def __post_init__(self) -> None:
        """Check that every parameter is finite; shapes add their own ranges."""
        for field in dataclasses.fields(self):
            self._require(math.isfinite(getattr(self, field.name)), field.name, "a finite number")

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """Return γ in z's shape and dtype."""

    def _require(self, condition: bool, option: str, allowed: str) -> None:
        require(condition, f"{type(self).__name__}.{option}", getattr(self, option), allowed)


@dataclass(frozen=True, kw_only=True)
class Linear(MapShape):
    """γ = g0 + k z; the only shape that gives low margins a negative γ.

    Args:
        g0: γ at z = 0, reward units.
        k: slope, >= 0, reward units per unit of z.

    >>> Linear(g0=1.0, k=0.5)(torch.tensor([-4.0, 0.0, 2.0]))
    tensor([-1.,  1.,  2.])
    """

    formula: ClassVar[str] = "γ = g0 + k z"

    g0: float = 0.5
    k: float = 0.25

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.k >= 0, "k", "a number >= 0")

    def __call__(self, z: Tensor) -> Tensor:
        """Return g0 + k z."""
        return self.g0 + self.k * z


@dataclass(frozen=True, kw_only=True)
class ClippedLinear(MapShape):
    """γ = gmax clip((z - low) / (high - low), 0, 1).

    Args:
        gmax: largest γ, >= 0, reward units.
        low: z up to which γ is 0, in units of z.
        high: z from which γ is gmax, > low, in units of z.

    >>> ClippedLinear(gmax=2.0, low=0.0, high=4.0)(torch.tensor([-1.0, 1.0, 9.0]))
    tensor([0.0000, 0.5000, 2.0000])
    """

    formula: ClassVar[str] = "γ = gmax · clip((z - low) / (high - low), 0, 1)"

    gmax: float = 1.0
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.gmax >= 0, "gmax", "a number >= 0")
        self._require(self.high > self.low, "high", f"a number > low ({self.low})")

    def __call__(self, z: Tensor) -> Tensor:
        """Return gmax clip((z - low) / (high - low), 0, 1)."""
        return self.gmax * ((z - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Piecewise(MapShape):
    """γ = k1 relu(z - t0) + (k2 - k1) relu(z - t1): nothing, then gentle, then steep.

    Args:
        k1: slope between t0 and t1, >= 0, reward units per unit of z.
        k2: slope above t1, >= k1, reward units per unit of z.
        t0: z up to which γ is 0, in units of z.
        t1: z from which the slope is k2, >= t0, in units of z.

    >>> Piecewise(k1=0.1, k2=0.5, t0=0.0, t1=1.0)(torch.tensor([-1.0, 0.5, 3.0]))
    tensor([0.0000, 0.0500, 1.1000])
    """

    formula: ClassVar[str] = "γ = k1 relu(z - t0) + (k2 - k1) relu(z - t1)"

    k1: float = 0.1
    k2: float = 0.5
    t0: float = 0.0
    t1: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.k1 >= 0, "k1", "a number >= 0")
        self._require(self.k2 >= self.k1, "k2", f"a number >= k1 ({self.k1})")
        self._require(self.t1 >= self.t0, "t1", f"a number >= t0 ({self.t0})")

    def __call__(self, z: Tensor) -> Tensor:
        """Return k1 relu(z - t0) + (k2 - k1) relu(z - t1)."""
        return self.k1 * (z - self.t0).relu() + (self.k2 - self.k1) * (z - self.t1).relu()


@dataclass(frozen=True, kw_only=True)
class Softplus(MapShape):
    """γ = (k/κ) log(1 + exp(κ (z - t))): the smooth form of two slopes, 0 and k.

    Args:
        k: slope far above the threshold, >= 0, reward units per unit of z.
        sharpness: κ, > 0, per unit of z; the bend is about 1/κ wide.
        threshold: t, the middle of the bend, in units of z.

    >>> Softplus(k=2.0, sharpness=1.0, threshold=0.0)(torch.tensor([0.0, 50.0]))
    tensor([  1.3863, 100.0000])
    """

    formula: ClassVar[str] = "γ = (k/κ) log(1 + exp(κ (z - t))), κ = sharpness, t = threshold"

    k: float = 0.5
    sharpness: float = 4.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.k >= 0, "k", "a number >= 0")
        self._require(self.sharpness > 0, "sharpness", "a number > 0")

    def __call__(self, z: Tensor) -> Tensor:
        """Return (k/κ) log(1 + exp(κ (z - t)))."""
        bent = torch.logaddexp(self.sharpness * (z - self.threshold), torch.zeros_like(z))
        return self.k / self.sharpness * bent


@dataclass(frozen=True, kw_only=True)
class Sigmoid(MapShape):
    """γ = gmax s((z - t) / T).

    Args:
        gmax: largest γ, >= 0, reward units.
        threshold: t, where γ is gmax / 2, in units of z.
        temperature: T, > 0, width of the rise in units of z.

    >>> Sigmoid(gmax=2.0, threshold=1.0, temperature=0.5)(torch.tensor([-9.0, 1.0, 9.0]))
    tensor([4.1223e-09, 1.0000e+00, 2.0000e+00])
    """

    formula: ClassVar[str] = "γ = gmax · s((z - t) / T), t = threshold, T = temperature"

    gmax: float = 1.0
    threshold: float = 1.0
    temperature: float = 0.25

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.gmax >= 0, "gmax", "a number >= 0")
        self._require(self.temperature > 0, "temperature", "a number > 0")

    def __call__(self, z: Tensor) -> Tensor:
        """Return gmax s((z - t) / T)."""
        return self.gmax * torch.sigmoid((z - self.threshold) / self.temperature)


@dataclass(frozen=True, kw_only=True)
class Power(MapShape):
    """γ = k relu(z - t)^p.

    Args:
        k: γ one unit above the threshold, >= 0, reward units.
        threshold: t, up to which γ is 0, in units of z.
        p: exponent, a number > 1.

    >>> Power(k=0.5, threshold=1.0, p=2.0)(torch.tensor([0.0, 2.0, 4.0]))
    tensor([0.0000, 0.5000, 4.5000])
    """

    formula: ClassVar[str] = "γ = k · relu(z - t)^p, t = threshold"

    k: float = 0.2
    threshold: float = 0.0
    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.k >= 0, "k", "a number >= 0")
        self._require(self.p > 1, "p", "a number > 1")

    def __call__(self, z: Tensor) -> Tensor:
        """Return k relu(z - t)^p."""
        return self.k * (z - self.threshold).relu() ** self.p


@dataclass(frozen=True, kw_only=True)
class Exp(MapShape):
    """γ = k (exp(min(relu(z - t), cap)) - 1).

    Args:
        k: slope just above the threshold, >= 0, reward units per unit of z.
        threshold: t, up to which γ is 0, in units of z.
        cap: distance above the threshold from which γ stays constant, > 0, in units of z.

    >>> Exp(k=1.0, threshold=0.0, cap=1.0)(torch.tensor([-1.0, 0.5, 9.0]))
    tensor([0.0000, 0.6487, 1.7183])
    """

    formula: ClassVar[str] = "γ = k · expm1(min(relu(z - t), cap)), t = threshold"

    k: float = 0.15
    threshold: float = 0.0
    cap: float = 2.5

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.k >= 0, "k", "a number >= 0")
        self._require(self.cap > 0, "cap", "a number > 0")

    def __call__(self, z: Tensor) -> Tensor:
        """Return k (exp(min(relu(z - t), cap)) - 1)."""
        return self.k * torch.expm1((z - self.threshold).clamp(0, self.cap))


@dataclass(frozen=True, kw_only=True)
class Quantile(MapShape):
    """γ = gmax F^p, F in [0, 1] the quantile of the reference margin; needs `standardize: quantile`.

    Args:
        gmax: γ of the most confident pair, >= 0, reward units.
        p: exponent, a number > 0: above 1 gentle then steep, 1 proportional to the rank, below 1 steep then gentle.

    >>> Quantile(gmax=2.0, p=0.5)(torch.tensor([0.0, 0.25, 1.0]))
    tensor([0., 1., 2.])
    """

    formula: ClassVar[str] = "γ = gmax · F^p, F = quantile of the pair's reference margin in the training split"

    gmax: float = 1.0
    p: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._require(self.gmax >= 0, "gmax", "a number >= 0")
        self._require(self.p > 0, "p", "a number > 0")

    def __call__(self, z: Tensor) -> Tensor:
        """Return gmax clip(z, 0, 1)^p."""
        return self.gmax * z.clamp(0, 1) ** self.p

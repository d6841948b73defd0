"""Ablations: the same margins given to the wrong pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses.base import Loss
from gamma_po.margins.base import Margin, PoolMargin
from gamma_po.margins.kl import KL
from gamma_po.ranks import Local, Ranks
from gamma_po.types import Evidence, PairLogps


def reversed_ranks(score: Tensor, target_margin: Tensor) -> Tensor:
    """Give the largest γ to the smallest score, and so on; the multiset of γ stays the same.

    Args:
        score: [M]; ties are ranked in their order.
        target_margin: [M].

    Returns:
        [M].

    >>> reversed_ranks(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.3, 0.1, 0.2]))
    tensor([0.1000, 0.3000, 0.2000])
    """
    order = score.argsort(stable=True)
    reversed_margin = torch.empty_like(target_margin)
    reversed_margin[order] = target_margin.sort(descending=True).values
    return reversed_margin


def _pool_margin(wrapper: str, inner: Margin) -> PoolMargin:
    if not isinstance(inner, PoolMargin):
        raise ConfigError(
            f"{wrapper}.inner={inner.name!r} is not allowed: it gives every pair the same or an unranked margin; "
            "allowed: kl, map"
        )
    return inner


@dataclass(frozen=True, kw_only=True)
class Reverse(Margin):
    """The inner margin's γ in reverse rank order over its pool (KL) or the training split (map).

    Args:
        inner: the margin to reverse.

    Source:
        the `reverse` ablation of γ-PO, arXiv 2506.03690.
    """

    name: ClassVar[str] = "reverse"
    formula: ClassVar[str] = "same γ's, largest to the least confident pair"
    source: ClassVar[str] = "ablation in arXiv 2506.03690"

    inner: Margin = field(default_factory=KL)

    def __post_init__(self) -> None:
        """Check the inner margin."""
        _pool_margin("reverse", self.inner)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_reference

    @property
    def needs_fit(self) -> bool:  # type: ignore[override]
        """As the inner margin."""
        return self.inner.needs_fit

    def bind(self, loss: Loss) -> Reverse:
        """Bind the inner margin."""
        return Reverse(inner=self.inner.bind(loss))

    def init(self) -> Any:
        """The inner margin's state."""
        return self.inner.init()

    def fit(self, reference: PairLogps) -> Any:
        """Fit the inner margin."""
        return self.inner.fit(reference)

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """Reverse within the pool, then take this rank's pairs."""
        inner = _pool_margin("reverse", self.inner)
        pool, state = inner.pool(reward_margin, evidence, state, ranks or Local())
        target_margin = reversed_ranks(pool.score, pool.target_margin)
        return target_margin[pool.position].to(reward_margin.dtype), state

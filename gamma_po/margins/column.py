"""A margin from the data: a number per pair, such as a rating gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, DataError, require
from gamma_po.margins.base import Margin
from gamma_po.ranks import Local, Ranks, as_one
from gamma_po.types import Evidence


@dataclass(frozen=True, kw_only=True)
class Column(Margin):
    """γ = scale · log(d) or scale · d, d the data column named by `data.columns.margin`.

    Args:
        scale: reward units per unit of log(d) or d, > 0.
        transform: "log" as published (needs d > 0), or "identity".

    Source:
        ODPO, arXiv 2402.10571: an offset that grows with the rating gap.
    """

    name: ClassVar[str] = "column"
    formula: ClassVar[str] = "γ = scale · log(d) or scale · d, d a data column (rating gap)"
    source: ClassVar[str] = "ODPO, arXiv 2402.10571"
    reads_column: ClassVar[bool] = True

    scale: float = 1.0
    transform: Literal["identity", "log"] = "identity"

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.scale > 0 and math.isfinite(self.scale), "column.scale", self.scale, "a number > 0")
        require(self.transform in ("identity", "log"), "column.transform", self.transform, "identity, log")

    def __call__(
        self, reward_margin: Tensor, evidence: Evidence, state: Any, ranks: Ranks | None = None
    ) -> tuple[Tensor, Any]:
        """The column's value of each pair.

        Raises:
            ConfigError: the data carry no column.
            DataError: a value of this rank or another is not finite, or not positive under the logarithm.
        """
        if evidence.column is None:
            raise ConfigError("the column margin needs a number per pair: name it in data.columns.margin")
        value = evidence.column.detach().to(reward_margin.dtype)
        with as_one(ranks or Local()):
            self._check(value)
        return self.scale * (value.log() if self.transform == "log" else value), state

    def check_column(self, column: Tensor) -> int | None:
        """The first row whose number is not finite, or has no logarithm where one is taken."""
        usable = torch.isfinite(column) & ((column > 0) | (self.transform == "identity"))
        return None if bool(usable.all()) else int((~usable).nonzero()[0])

    def _check(self, value: Tensor) -> None:
        row = self.check_column(value)
        if row is not None:
            raise DataError(
                f"the margin column holds {float(value[row])}; allowed: finite numbers, > 0 with "
                "column.transform=log; or use column.transform=identity"
            )

"""Target margins γ, in reward units, for any loss.

A margin is `margin(reward_margin, evidence, state) -> (γ [P], next state)`. To add one: write a frozen
dataclass with `__call__` and name it in MARGINS.
"""

from __future__ import annotations

from typing import Any

from gamma_po.errors import unknown_name
from gamma_po.margins.ablations import Reverse, Shuffled
from gamma_po.margins.allocation import Dual, Exact, KLPool, KLSolver, MirrorDescent, RecentPool, SampledPool
from gamma_po.margins.base import GammaBetaRatio, Margin, PoolMargin
from gamma_po.margins.column import Column
from gamma_po.margins.constant import Fixed, NoMargin
from gamma_po.margins.kl import KL, KLAuthors, KLDual
from gamma_po.margins.mapped import Map
from gamma_po.margins.mirror_descent import mirror_descent_margins
from gamma_po.margins.running import AlphaDPO, AMaPO
from gamma_po.margins.solver import solve_kl_margins
from gamma_po.registry import build

MARGINS: dict[str, type[Margin]] = {
    "none": NoMargin,
    "fixed": Fixed,
    "kl": KL,
    "kl_dual": KLDual,
    "kl_authors": KLAuthors,
    "map": Map,
    "column": Column,
    "alpha_dpo": AlphaDPO,
    "amapo": AMaPO,
    "reverse": Reverse,
    "shuffled": Shuffled,
}


def build_margin(name: str, **options: Any) -> Margin:
    """Build a margin from its registry name.

    Raises:
        ConfigError: unknown name, or an option that this margin does not use.

    >>> build_margin("fixed", gamma=0.5)
    Fixed(gamma=0.5)
    >>> build_margin("kl", tau=0.3, center=False, solver=Dual(window=128)).solver
    Dual(window=128)
    """
    if name not in MARGINS:
        raise unknown_name("margin", name, MARGINS)
    return build(MARGINS[name], name, options)


__all__ = [
    "KL",
    "MARGINS",
    "AMaPO",
    "AlphaDPO",
    "Column",
    "Dual",
    "Exact",
    "Fixed",
    "GammaBetaRatio",
    "KLAuthors",
    "KLDual",
    "KLPool",
    "KLSolver",
    "Map",
    "Margin",
    "MirrorDescent",
    "NoMargin",
    "PoolMargin",
    "RecentPool",
    "Reverse",
    "SampledPool",
    "Shuffled",
    "build_margin",
    "mirror_descent_margins",
    "solve_kl_margins",
]

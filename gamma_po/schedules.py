"""Learning-rate schedules as multipliers of the optimizer's own rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]
DECAYS: dict[Schedule, Callable[[float], float]] = {  # by the share of the steps after the warm-up, in [0, 1]
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


def warmup_then(schedule: Schedule, *, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Return step -> multiplier: a linear warm-up, then the schedule down to zero (or flat).

    Args:
        schedule: after the warm-up: half a cosine, a line, or 1.
        total_steps: optimizer steps of the run.
        warmup_ratio: share of them in the warm-up, in [0, 1).

    >>> factor = warmup_then("linear", total_steps=10, warmup_ratio=0.2)
    >>> [round(factor(step), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup_steps, decay = math.ceil(total_steps * warmup_ratio), DECAYS[schedule]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return factor

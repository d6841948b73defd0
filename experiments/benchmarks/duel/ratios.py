"""From the steps of the arms to ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from duel.plan import ARMS, MEMORY_TARGETS, TIME_TARGETS, Mode, memory_counterpart
from duel.turns import Step


class Spread(NamedTuple):
    """Median and range; no range where there is one number only."""

    median: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class Result:
    """An arm, measured.

    Args:
        mode: LoRA or full.
        name: of the arm.
        group: arms of the same group took turns.
        steps: those that count.
        real_tokens: of each of these steps, without padding.
        peak: memory over these steps, MiB.
        flops: counted in another step on the rows of the first of these steps.
    """

    mode: Mode
    name: str
    group: int
    steps: Sequence[Step]
    real_tokens: Sequence[int]
    peak: float
    flops: int

    @property
    def cost(self) -> Spread:
        """Seconds per step."""
        return Spread.of([step.cost for step in self.steps])

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of wall time, over all steps."""
        return sum(self.real_tokens) / sum(step.wall for step in self.steps)

    def share_of_peak(self, peak_rate: float) -> float:
        """Counted FLOPs of the first step / what the machine's best matrix product would do in its time."""
        return self.flops / (peak_rate * self.steps[0].cost)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A rival against ours.

    Args:
        mode: LoRA or full.
        rival: of TRL's arms.
        time: time of TRL / time of ours: step by step where both trained on the same batches, otherwise of all
            steps together, per pair.
        memory: peak memory of ours / peak memory of TRL's, both with gradient checkpointing or both without.
    """

    mode: Mode
    rival: str
    time: Spread
    memory: float | None

    @property
    def time_target(self) -> float | None:
        """At least."""
        return TIME_TARGETS.get((self.mode, self.rival))

    @property
    def memory_target(self) -> float | None:
        """At most."""
        return MEMORY_TARGETS.get((self.mode, self.rival))


def time_ratio(rival: Sequence[Step], ours: Sequence[Step]) -> Spread:
    """Time of the rival / time of ours."""
    if [step.facts.rows for step in rival] == [step.facts.rows for step in ours]:
        return Spread.of([a.cost / b.cost for a, b in zip(rival, ours, strict=True)])
    return Spread(_cost_per_pair(rival) / _cost_per_pair(ours), None, None)


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Compare each of TRL's arms with ours: in time with the one beside which it ran, in memory with any."""
    ours = {(result.mode, result.group): result for result in results if result.name == "ours"}
    peaks = {(result.mode, result.name): result.peak for result in results}
    compared = []
    for rival in results:
        if ARMS[rival.name].side == "trl":
            peak = peaks.get((rival.mode, memory_counterpart(rival.name)))
            memory = None if peak is None else peak / rival.peak
            time = time_ratio(rival.steps, ours[rival.mode, rival.group].steps)
            compared.append(Ratio(mode=rival.mode, rival=rival.name, time=time, memory=memory))
    return compared


def _cost_per_pair(steps: Sequence[Step]) -> float:
    return sum(step.cost for step in steps) / sum(len(step.facts.rows) for step in steps)

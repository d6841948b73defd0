"""How strongly, and in which direction, to trust the reference's margin: chosen on held-out pairs.

A map with strength k (see `Map`) is trained for every k of a list. Held-out pairs then say which policy explains
their labels best, by the likelihood s(c (f_chosen - f_rejected)) with the best c for each policy; what is not better
than no margin by more than its standard error is not trusted. The labels may be noisy, if there are more of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError
from gamma_po.losses import DPO
from gamma_po.margins import Map, NoMargin
from gamma_po.studies.arms import MAP_BUDGET, base_arms
from gamma_po.studies.running import Job, Row, Testbed, run_jobs, split
from gamma_po.studies.settings import Setting
from gamma_po.studies.study import Study, common_checks, compare, oracle_check
from gamma_po.studies.training import Training

STRENGTHS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)


class Choice(NamedTuple):
    """What held-out pairs say of a list of strengths."""

    strength: float
    gain: list[float]  # mean log-likelihood per pair over that without a margin, by strength
    error: list[float]  # its standard error, paired


def choose(strengths: Sequence[float], log_likelihood: Tensor) -> Choice:
    """Choose the likeliest strength, if it is likelier than 0 by more than its standard error; else 0.

    Args:
        strengths: S of them, 0 among them.
        log_likelihood: per pair, [S, N].

    Raises:
        ConfigError: 0 is not among the strengths.

    >>> choose((0.0, 1.0), torch.tensor([[-0.7, -0.7, -0.7], [-0.5, -0.4, -0.6]])).strength
    1.0
    """
    if 0.0 not in strengths:
        raise ConfigError(f"strengths={list(strengths)}: 0 must be among them, as what the others are compared with")
    difference = log_likelihood - log_likelihood[strengths.index(0.0)]
    gain = difference.mean(1)
    error = difference.std(1) / math.sqrt(difference.shape[1])
    best = int(gain.argmax())
    trusted = bool(gain[best] > error[best])
    return Choice(float(strengths[best]) if trusted else 0.0, gain.tolist(), error.tolist())


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The protocol's numbers; as in `PlugAndPlay`, with one choice per seed, reference and flip rate.

    Args:
        testbed: S1 with `calibration` pairs.
        seeds: of the worlds.
        rhos: references.
        flips: flip rates.
        clean: how many pairs with labels as annotated; the noisy choice uses all of the testbed's calibration
            pairs, with labels flipped as in training.
        strengths: of the map, with a mean γ of `MAP_BUDGET` at strength 1.
        beta: of every arm.
        learning_rate: of every arm.
        margin: smallest difference of interest, of win rates.
        kls: at which policies are compared; the first is in the tables.
        training: steps, batch, schedule.
    """

    testbed: Testbed
    seeds: tuple[int, ...]
    rhos: tuple[float, ...] = (0.0, 0.5, 0.75)
    flips: tuple[float, ...] = (0.0, 0.2, 0.4)
    clean: int = 300
    strengths: tuple[float, ...] = STRENGTHS
    beta: float = 0.1
    learning_rate: float = 0.01
    margin: float = 0.01
    kls: tuple[float, ...] = (1.0, 0.1, 0.25, 0.5, 2.0)
    training: Training = dataclasses.field(default_factory=Training)

    def run(self, *, workers: int, seeds_at_once: int = 5, visible: bool = True) -> Study:
        """Train every strength, choose, compare."""
        settings = [setting for flips in self.flips for setting in self._settings(flips)]
        job = Job(
            testbed=self.testbed, seeds=self.seeds, rhos=self.rhos, settings=tuple(settings), training=self.training,
            kls=self.kls, traced=frozenset({"dpo"}), calibration_clean=self.clean,
        )  # fmt: skip
        found = run_jobs(split(job, seeds_at_once), workers=workers, description="strengths", visible=visible)
        rows = self._with_choices(found.rows)
        metrics = ("win_rate", f"win_rate_kl{self.kls[0]:g}")
        oracle = "oracle: no flipped pairs"
        against = {name: ("dpo", "map") for name in self._choices()} | {"map": ("dpo",), oracle: ("dpo",)}
        return Study(
            title=f"the map's strength chosen on held-out pairs: β = {self.beta:g}, lr {self.learning_rate:g}",
            config=self.config(), metrics=metrics, rows=rows, traces=found.traces,
            pairings=compare([row for row in rows if row["stage"] == "arms"], against, metrics, self.margin),
            checks=common_checks(rows) + oracle_check(rows, metrics[1], "dpo", oracle),
            levels=("strength", "kl", "ref_acc"),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The resolved numbers."""
        return {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def _choices(self) -> dict[str, str]:
        """Arms that are chosen, and the column of what they are chosen by."""
        noisy = getattr(self.testbed, "calibration", 0)
        return {
            f"map, calibrated on {self.clean} clean pairs": "calibration_clean",
            f"map, calibrated on {noisy} noisy pairs": "calibration_noisy",
        }

    def _settings(self, flips: float) -> list[Setting]:
        same = {"loss": DPO(beta=self.beta), "learning_rate": self.learning_rate, "flip_rate": flips}
        maps = [
            Setting(arm=f"strength {k:g}", margin=Map(budget=MAP_BUDGET, strength=k) if k else NoMargin(), **same)
            for k in self.strengths
        ]
        return [*(arm.setting for arm in base_arms(self.beta, self.learning_rate, flips)), *maps]

    def _with_choices(self, rows: Sequence[Row]) -> list[Row]:
        """Add the rows of the chosen strengths, and of strength 1 as `map`."""
        cells: dict[tuple[Any, ...], dict[float, Row]] = {}
        found = []
        for row in rows:
            name, _, value = row["arm"].partition(" ")
            row = {"stage": "strengths" if name == "strength" else "arms", "strength": 0.0} | row
            if name == "strength":
                row["strength"] = float(value)
                cells.setdefault((row["seed"], row["rho"], row["flip_rate"]), {})[float(value)] = row
            found.append(row)
        for cell in cells.values():
            found.append(cell[1.0] | {"stage": "arms", "arm": "map"})
            for arm, column in self._choices().items():
                values = torch.stack([torch.as_tensor(cell[k][column]) for k in self.strengths])
                found.append(cell[choose(self.strengths, values).strength] | {"stage": "arms", "arm": arm})
        columns = ("calibration_clean", "calibration_noisy")
        return [{name: value for name, value in row.items() if name not in columns} for row in found]

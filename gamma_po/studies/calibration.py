"""How strongly, and in which direction, to trust the reference's margin: chosen on held-out pairs.

A map with strength k (see `Map`) is trained for every k of a list. Held-out pairs then say which policy explains
their labels best, by the likelihood s(c (f_chosen - f_rejected)) with the best c for each policy; what is not better
than no margin by more than two standard errors is not trusted. The labels may be noisy, if there are more of them.
The control is what the same pairs give when they are trained on instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gamma_po.errors import ConfigError, DataError
from gamma_po.losses import DPO
from gamma_po.margins import Map, NoMargin
from gamma_po.studies.arms import MAP_BUDGET, base_arms
from gamma_po.studies.bandit import Bandit
from gamma_po.studies.further_pairs import TrainedOn
from gamma_po.studies.running import Job, Row, run_jobs, split
from gamma_po.studies.settings import Setting
from gamma_po.studies.study import Study, common_checks, compare, oracle_check
from gamma_po.studies.training import Training

STRENGTHS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)
ERRORS_NEEDED = 2.0  # standard errors by which a margin must beat none: the best of several is above 0 by chance


class Choice(NamedTuple):
    """What held-out pairs say of a list of strengths."""

    strength: float
    gain: list[float]  # mean log-likelihood per pair over that without a margin, by strength
    error: list[float]  # its standard error, paired, pairs of the same prompt counted together


def check_strengths(strengths: Sequence[float]) -> None:
    """Refuse lists that leave nothing to compare with, or name a strength twice.

    Raises:
        ConfigError: 0 is missing, or a strength is there twice or not finite.
    """
    if 0.0 not in strengths:
        raise ConfigError(f"strengths={list(strengths)}: 0 must be among them, as what the others are compared with")
    names = [f"{strength:g}" for strength in strengths]
    if len(set(names)) < len(names) or not all(map(math.isfinite, strengths)):
        raise ConfigError(f"strengths={list(strengths)} is not allowed; allowed: finite numbers, each once")


def choose(strengths: Sequence[float], log_likelihood: Tensor, prompts: Tensor | None = None) -> Choice:
    """Choose the likeliest strength, if it is likelier than 0 by more than two standard errors; else 0.

    Args:
        strengths: S of them, 0 among them, each once.
        log_likelihood: per pair, [S, N].
        prompts: number of each pair's prompt, integers, [N]; by default every pair has one of its own.

    Raises:
        ConfigError: 0 is not among the strengths, or one is there twice.
        DataError: all pairs have the same prompt.

    >>> choose((0.0, 1.0), torch.tensor([[-0.7, -0.7, -0.7], [-0.5, -0.4, -0.6]])).strength
    1.0
    """
    check_strengths(strengths)
    difference = (log_likelihood - log_likelihood[strengths.index(0.0)]).double()
    gain, error = difference.mean(1), clustered_error(difference, prompts)
    best = int(gain.argmax())
    trusted = bool(gain[best] > ERRORS_NEEDED * error[best])
    return Choice(float(strengths[best]) if trusted else 0.0, gain.tolist(), error.tolist())


def clustered_error(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """Return the standard error of means of values that depend on each other within groups.

    SE² = G / (G - 1) Σ_g (Σ_{i in g} (x_i - x̄))² / N²; with groups of one this is the usual s / √N.

    Args:
        values: [..., N].
        groups: integers, [N]; by default each value is a group.

    Raises:
        DataError: a single group.

    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> float(clustered_error(x)), float(clustered_error(x.repeat(2), torch.tensor([0, 1, 2, 0, 1, 2])))
    (0.5773502588272095, 0.5773502588272095)
    """
    _, group = (torch.arange(values.shape[-1]) if groups is None else groups).unique(return_inverse=True)
    count = int(group.max()) + 1
    if count < 2:
        raise DataError(f"the {values.shape[-1]} held-out pairs have one prompt; a standard error needs two prompts")
    deviation = values - values.mean(-1, keepdim=True)
    sums = torch.zeros(*values.shape[:-1], count, dtype=values.dtype).index_add(-1, group, deviation)
    return (sums.square().sum(-1) * count / (count - 1)).sqrt() / values.shape[-1]


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

    testbed: Bandit
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
        jobs = [part for own in (job, *self._trained_on(job)) for part in split(own, seeds_at_once)]
        found = run_jobs(jobs, workers=workers, description="strengths", visible=visible)
        rows = self._with_choices(found.rows)
        metrics = ("win_rate", f"win_rate_kl{self.kls[0]:g}")
        oracle = "oracle: no flipped pairs"
        against = {name: ("dpo", "map") for name in self._choices()} | {"map": ("dpo",), oracle: ("dpo",)}
        against |= dict.fromkeys(self._further(), ("dpo",))
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
        return {
            f"map, calibrated on {self.clean} clean pairs": "calibration_clean",
            f"map, calibrated on {self.testbed.calibration} noisy pairs": "calibration_noisy",
        }

    def _further(self) -> dict[str, TrainedOn]:
        """Arms of the base loss that are trained on the calibration pairs, and their worlds."""
        noisy = self.testbed.calibration
        return {
            f"dpo on the {self.clean} clean pairs alone": TrainedOn(testbed=self.testbed, own=False, clean=self.clean),
            f"dpo on the {self.clean} clean pairs, too": TrainedOn(testbed=self.testbed, clean=self.clean),
            f"dpo on the {noisy} noisy pairs, too": TrainedOn(testbed=self.testbed, noisy=noisy),
        }

    def _trained_on(self, job: Job) -> list[Job]:
        same = {"loss": DPO(beta=self.beta), "learning_rate": self.learning_rate}
        return [
            dataclasses.replace(
                job, testbed=testbed, calibration_clean=0,
                settings=tuple(Setting(arm=name, flip_rate=flips, **same) for flips in self.flips),
            )
            for name, testbed in self._further().items()
        ]  # fmt: skip

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

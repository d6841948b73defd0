"""Protocol P1: one β and learning rate for all arms, as for a user who adds γ to a working recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gamma_po.losses import DPO
from gamma_po.studies.arms import Arm, Arms
from gamma_po.studies.running import Cell, Job, Results, Row, Testbed, merged, run_jobs, split
from gamma_po.studies.settings import Setting
from gamma_po.studies.slope import Slope, fit_slope, matched
from gamma_po.studies.study import Study, common_checks, compare, oracle_check
from gamma_po.studies.training import Training

BASE, ORACLE = "dpo", "oracle: no flipped pairs"


@dataclass(frozen=True, kw_only=True)
class PlugAndPlay:
    """The protocol's numbers.

    Args:
        testbed: S1 or S2.
        arms: what is compared.
        seeds: of the worlds.
        rhos: references.
        flips: flip rates.
        beta: of every arm, reward units per nat.
        learning_rate: of every arm.
        beta_curve: β's at which the base loss alone is also run.
        margin: smallest difference of interest, of win rates.
        kls: KLs at which policies are also compared, by rescaling; the first is in the tables.
        training: steps, batch, schedule.
    """

    testbed: Testbed
    arms: Arms
    seeds: tuple[int, ...]
    rhos: tuple[float, ...] = (0.0, 0.5, 0.75)
    flips: tuple[float, ...] = (0.0, 0.2, 0.4)
    beta: float = 0.1
    learning_rate: float = 0.01
    beta_curve: tuple[float, ...] = ()
    margin: float = 0.01
    kls: tuple[float, ...] = (1.0, 0.1, 0.25, 0.5, 2.0)
    training: Training = dataclasses.field(default_factory=Training)

    def run(self, *, workers: int, seeds_at_once: int = 5, visible: bool = True) -> Study:
        """Run all arms, then the controls fitted to them, and compare."""
        arms = [arm for flips in self.flips for arm in self.arms(self.beta, self.learning_rate, flips)]
        settings = [arm.setting for arm in arms]
        traced = frozenset({BASE} | {arm.setting.arm for arm in arms if arm.control})
        job = self._job(self.rhos, [*settings, *self._curve()], traced)
        main = run_jobs(split(job, seeds_at_once), workers=workers, description="arms", visible=visible)
        slopes = _fit(arms, main)
        jobs = [
            piece
            for rho in self.rhos
            if (controls := _controls(arms, slopes, rho))
            for piece in split(self._job((rho,), controls, frozenset()), 2 * seeds_at_once)
        ]
        controls = run_jobs(jobs, workers=workers, description="controls", visible=visible)
        return self._study(arms, merged([main, controls]), slopes)

    def _job(self, rhos: Sequence[float], settings: Sequence[Setting], traced: frozenset[str]) -> Job:
        return Job(
            testbed=self.testbed, seeds=self.seeds, rhos=tuple(rhos), settings=tuple(settings),
            training=self.training, kls=self.kls, traced=traced,
        )  # fmt: skip

    def _curve(self) -> list[Setting]:
        return [
            Setting(arm=f"{BASE}, β={beta:g}", loss=DPO(beta=beta), learning_rate=self.learning_rate, flip_rate=flips)
            for beta in self.beta_curve
            for flips in self.flips
        ]

    def _study(self, arms: Sequence[Arm], results: Results, slopes: dict[Cell, Slope]) -> Study:
        rows = _staged(results.rows, {arm.control for arm in arms}, {setting.arm for setting in self._curve()})
        metrics = ("win_rate", f"win_rate_kl{self.kls[0]:g}")
        against = {arm.setting.arm: arm.against for arm in arms}
        against |= {arm.control: arm.against[:1] for arm in arms if arm.control}
        pairings = compare(rows, against, metrics, self.margin)
        checks = common_checks(rows) + oracle_check(rows, metrics[1], BASE, ORACLE)
        return Study(
            title=f"P1, plug-and-play: β = {self.beta:g}, learning rate {self.learning_rate:g} for every arm",
            config=self.config(), metrics=metrics, rows=rows, pairings=pairings, slopes=slopes,
            traces=results.traces, checks=checks,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The resolved numbers."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "arms"}
        arms = {
            flips: [repr(arm.setting) for arm in self.arms(self.beta, self.learning_rate, flips)]
            for flips in self.flips
        }
        return {name: repr(value) for name, value in values.items()} | {"protocol": "P1", "arms": arms}


def _fit(arms: Sequence[Arm], results: Results) -> dict[Cell, Slope]:
    """Fit s(a - b h) to the gradient weights of every arm that has a control, over all seeds."""
    names = {arm.setting.arm for arm in arms if arm.control}
    return {
        cell: fit_slope(trace.reward_margin, trace.weight) for cell, trace in results.traces.items() if cell[0] in names
    }


def _controls(arms: Sequence[Arm], slopes: dict[Cell, Slope], rho: float) -> list[Setting]:
    return [
        matched(arm.setting, slopes[arm.setting.arm, rho, arm.setting.flip_rate], arm.control)
        for arm in arms
        if arm.control and slopes[arm.setting.arm, rho, arm.setting.flip_rate].has_control
    ]


def _staged(rows: list[Row], controls: set[str | None], curve: set[str]) -> list[Row]:
    stage = {name: "control" for name in controls} | {name: "beta curve" for name in curve}
    return [{"stage": stage.get(row["arm"], "arms")} | row for row in rows]

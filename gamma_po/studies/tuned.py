"""Protocol P2: every method tuned with the same budget on seeds of its own, then compared at equal KL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gamma_po.margins import Fixed
from gamma_po.studies.methods import Config, Method, at_edges, methods, neighbourhood
from gamma_po.studies.running import Cell, Job, Results, Row, Testbed, run_jobs, split
from gamma_po.studies.settings import Setting
from gamma_po.studies.slope import Slope, fit_slope, matched
from gamma_po.studies.study import Study, common_checks, compare, oracle_check
from gamma_po.studies.training import Training
from gamma_po.studies.worlds import TUNING_SEED

Key = tuple[str, float, float]  # method, ρ, flip rate
Scores = dict[Key, dict[Config, float]]
FRONTIER = (0.1, 0.25, 0.5, 2.0)  # further KLs at which tuned policies are measured
BASE, ORACLE = "dpo", "oracle: no flipped pairs"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The protocol's numbers.

    Args:
        testbed: S1 or S2.
        methods: names of methods to tune.
        seeds: for the comparison.
        tuning_seeds: how many others for tuning.
        rhos: references; tuned for each.
        flips: flip rates; tuned for each.
        extensions: how often a grid may be extended where its best configuration lies on an edge.
        kl: at which policies are tuned and compared, nats.
        margin: smallest difference of interest, of win rates.
        training: steps, batch, schedule.
    """

    testbed: Testbed
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: int = 6
    rhos: tuple[float, ...] = (0.0, 0.5, 0.75)
    flips: tuple[float, ...] = (0.0, 0.2, 0.4)
    extensions: int = 5
    kl: float = 1.0
    margin: float = 0.01
    training: Training = dataclasses.field(default_factory=Training)

    @property
    def metric(self) -> str:
        """What is tuned and compared."""
        return f"win_rate_kl{self.kl:g}"

    def run(self, *, workers: int, visible: bool = True) -> Study:
        """Tune at every flip rate, fit the controls, evaluate, compare."""
        chosen = methods(self.methods)
        scores: Scores = {}
        rows: list[Row] = []
        for flips in self.flips:
            rows += self._tune(chosen, flips, scores, workers, visible)
        best = {key: max(found, key=lambda config: found[config]) for key, found in scores.items()}
        slopes = self._slopes(chosen, best, workers, visible)
        evaluated = self._evaluate(chosen, best, slopes, workers, visible)
        rows += [{"stage": "evaluation"} | row for row in evaluated.rows]
        return self._study(chosen, rows, scores, best, slopes, evaluated)

    def _tune(self, chosen: Sequence[Method], flips: float, scores: Scores, workers: int, visible: bool) -> list[Row]:
        todo = {(method.name, rho, flips): method.configurations() for method in chosen for rho in self.rhos}
        rows = []
        for extension in range(self.extensions + 1):
            label = f"tuning, flips {flips:g}" + (f", extension {extension}" if extension else "")
            rows += self._score(chosen, todo, scores, label, workers, visible)
            todo = {}
            for method in chosen:
                for rho in self.rhos:
                    key = (method.name, rho, flips)
                    best = max(scores[key], key=lambda config, found=scores[key]: found[config])
                    if new := [config for config in neighbourhood(method, best) if config not in scores[key]]:
                        todo[key] = new
            if not todo:
                break
        return rows

    def _score(
        self, chosen: Sequence[Method], todo: dict[Key, list[Config]], scores: Scores, label: str, workers: int,
        visible: bool,
    ) -> list[Row]:  # fmt: skip
        """Run configurations on the tuning seeds; ρ's with the same configurations share a job."""
        build = {method.name: method.build for method in chosen}
        by_rho = {rho: {key[::2]: configs for key, configs in todo.items() if key[1] == rho} for rho in self.rhos}
        shared = list(by_rho.values()).count(by_rho[self.rhos[0]]) == len(self.rhos)
        jobs, order = [], {}
        for rhos in [self.rhos] if shared else [(rho,) for rho in self.rhos]:
            settings = []
            for (name, flips), configs in by_rho[rhos[0]].items():
                for config in configs:
                    arm = f"{name}#{','.join(f'{value:.6g}' for value in config)}"
                    order[arm] = (name, config)
                    settings.append(build[name](arm, flips, config))
            if settings:
                jobs += split(self._job(self._tuning_seeds, rhos, settings), 1 if shared else 2)
        found = run_jobs(jobs, workers=workers, description=label, visible=visible).rows
        sums: dict[tuple[Key, Config], list[float]] = {}
        for row in found:
            name, config = order[row["arm"]]
            value = row[self.metric]
            sums.setdefault(((name, row["rho"], row["flip_rate"]), config), []).append(value)
            row["arm"] = name
        for (key, config), values in sums.items():
            mean = math.fsum(values) / len(values)
            scores.setdefault(key, {})[config] = mean if mean == mean else -math.inf
        return [{"stage": "tuning"} | row for row in found]

    @property
    def _tuning_seeds(self) -> tuple[int, ...]:
        return tuple(range(TUNING_SEED, TUNING_SEED + self.tuning_seeds))

    def _job(
        self, seeds: Sequence[int], rhos: Sequence[float], settings: Sequence[Setting],
        traced: frozenset[str] = frozenset(),
    ) -> Job:  # fmt: skip
        training = self.training if traced else dataclasses.replace(self.training, snapshot_every=self.training.steps)
        return Job(
            testbed=self.testbed, seeds=tuple(seeds), rhos=tuple(rhos), settings=tuple(settings), training=training,
            kls=(self.kl, *FRONTIER) if traced else (self.kl,), traced=traced,
        )  # fmt: skip

    def _slopes(
        self, chosen: Sequence[Method], best: dict[Key, Config], workers: int, visible: bool
    ) -> dict[Cell, Slope]:
        """Fit the controls to the tuned methods, on the tuning seeds."""
        fitted = [method for method in chosen if method.control]
        if not fitted:
            return {}
        jobs = []
        for rho in self.rhos:
            settings = [m.build(m.name, f, best[m.name, rho, f]) for m in fitted for f in self.flips]
            traced = frozenset(method.name for method in fitted)
            jobs.append(self._job(self._tuning_seeds, (rho,), settings, traced))
        found = run_jobs(jobs, workers=workers, description="controls", visible=visible)
        return {cell: fit_slope(trace.reward_margin, trace.weight) for cell, trace in found.traces.items()}

    def _evaluate(
        self, chosen: Sequence[Method], best: dict[Key, Config], slopes: dict[Cell, Slope], workers: int, visible: bool
    ) -> Results:
        jobs = []
        for rho in self.rhos:
            settings = []
            for flips in self.flips:
                own = {m.name: m.build(m.name, flips, best[m.name, rho, flips]) for m in chosen}
                settings += own.values()
                settings += [
                    matched(own[m.name], slopes[m.name, rho, flips], m.control)
                    for m in chosen
                    if m.control is not None and slopes[m.name, rho, flips].has_control
                ]
                settings.append(dataclasses.replace(own[BASE], arm=f"{BASE}, γ=0", margin=Fixed(gamma=0.0)))
            traced = frozenset({BASE} | {method.name for method in chosen if method.control})
            jobs += split(self._job(self.seeds, (rho,), settings, traced), 5)
        return run_jobs(jobs, workers=workers, description="evaluation", visible=visible)

    def _study(
        self, chosen: Sequence[Method], rows: list[Row], scores: Scores, best: dict[Key, Config],
        slopes: dict[Cell, Slope], evaluated: Results,
    ) -> Study:  # fmt: skip
        final = [row for row in rows if row["stage"] == "evaluation"]
        against = {method.name: tuple(o for o in method.against if o in self._arms(chosen)) for method in chosen}
        against |= {method.control: method.against[:1] for method in chosen if method.control}
        pairings = compare(final, against, (self.metric,), self.margin)
        checks = common_checks(final) + oracle_check(final, self.metric, BASE, ORACLE)
        tuned = []
        for method in chosen:
            for (name, rho, flips), config in best.items():
                if name == method.name:
                    tried = scores[name, rho, flips]
                    values = {axis.name: value for axis, value in zip(method.axes, config, strict=True)}
                    edges = "; ".join(at_edges(method, config, set(tried)))
                    tuned.append(
                        {"arm": name, "rho": rho, "flip_rate": flips, "configurations": len(tried),
                         "options": values, "at_edge": edges, "tuning_win_rate": tried[config]}
                    )  # fmt: skip
        return Study(
            title=f"P2, tuned: every method tuned on {self.tuning_seeds} seeds of its own, compared at KL {self.kl:g}",
            config=self.config(), metrics=(self.metric,), rows=rows, pairings=pairings, slopes=slopes, tuned=tuned,
            traces=evaluated.traces, checks=checks,
        )  # fmt: skip

    def _arms(self, chosen: Sequence[Method]) -> set[str]:
        return {method.name for method in chosen} | {method.control for method in chosen if method.control}

    def config(self) -> dict[str, Any]:
        """The resolved numbers."""
        values = {field.name: repr(getattr(self, field.name)) for field in dataclasses.fields(self)}
        grids = {m.name: {a.name: list(a.values) for a in m.axes} for m in methods(self.methods)}
        return values | {"protocol": "P2", "grids": grids}

"""Testbed S3, protocol P2: a grid of options per arm, tuned on seeds of their own, and the study of what was chosen."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gamma_po.errors import DataError, require, require_integer
from gamma_po.studies.lm_plan import LanguageArm, LanguageStudy, Unit, check_names, option, plan
from gamma_po.studies.methods import Axis, Config, at_edges, neighbourhood
from gamma_po.studies.running import Row
from gamma_po.studies.worlds import TUNING_SEED

Tried = dict[Config, float]  # mean win rate over the tuning seeds, by configuration
LIMITS = {"label_smoothing": 0.5}  # options that stay below a value when a grid is extended
LIST = "a list of two or more increasing numbers > 0"


@dataclass(frozen=True, kw_only=True)
class TunedArm(LanguageArm):
    """An arm, and where its options come from: exactly one of `grid`, `tuned_as` and `matched_to`.

    Args:
        grid: two or more increasing numbers > 0 by the dotted name of an option; all combinations are tried. The
            first two options, β and the learning rate, can stand in for each other: see `methods.neighbourhood`.
        tuned_as: an arm with a grid; this arm takes what is chosen there.
    """

    grid: dict[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The grid, with short names where they differ."""
        short = [key.rpartition(".")[2] for key in self.grid]
        names = short if len(set(short)) == len(short) else list(self.grid)
        limits = [LIMITS.get(name, math.inf) for name in short]
        return tuple(map(Axis, names, map(tuple, self.grid.values()), limits))

    def configurations(self) -> list[Config]:
        """All combinations."""
        return list(itertools.product(*(axis.values for axis in self.axes)))

    def options(self, config: Config) -> dict[str, Any]:
        """Return a configuration as options of `fit`."""
        return dict(zip(self.grid, config, strict=True))

    def label(self, config: Config) -> str:
        """Return a configuration in words, all of its digits."""
        return ", ".join(f"{axis.name} {value:.12g}" for axis, value in zip(self.axes, config, strict=True))


@dataclass(frozen=True, kw_only=True)
class TunedStudy(LanguageStudy):
    """A study whose arms are tuned before they are compared, at each flip rate.

    Args:
        arms: by name; the first is the base loss.
        tuning_seeds: how many, from 1,000,000 on; those of the comparison start at 0.
        tuning_set: options of `fit` that tuning runs have instead, e.g. other test pairs, and no samples.
        extensions: how often a grid may be extended where its best configuration lies on an edge.
    """

    arms: dict[str, TunedArm]  # type: ignore[assignment]
    tuning_seeds: int = 2
    tuning_set: dict[str, Any] = field(default_factory=dict)
    extensions: int = 1

    def __post_init__(self) -> None:
        """Check the grids, and that all arms have the same budget."""
        super().__post_init__()
        require_integer("tuning_seeds", self.tuning_seeds, at_least=1)
        require_integer("extensions", self.extensions, at_least=0)
        require(self.seeds <= TUNING_SEED, "seeds", self.seeds, f"at most {TUNING_SEED}, where tuning seeds start")
        allowed = "two columns of gold rewards: arms are tuned by their win rate at the first of kls"
        require(bool(self.gold_columns), "gold_columns", self.gold_columns, allowed)
        check_names("tuning_set", self.tuning_set)
        tuned = [name for name in self.chosen if self.arms[name].grid]
        for name in self.chosen:
            self._check_arm(name, tuned)
        sizes = {name: len(self.arms[name].configurations()) for name in tuned}
        require(len(set(sizes.values())) == 1, "configurations in the grids", sizes, "as many for every arm")
        there = self.arms[self.base].noise
        allowed = "null: the base loss is compared with at every flip rate"
        require(there is None or set(self.noise) <= set(there), f"arms.{self.base}.noise", there, allowed)

    @property
    def metric(self) -> str:
        """What is tuned and compared."""
        return f"win_rate_kl{self.kls[0]:g}"

    def at(self, rate: float) -> dict[str, TunedArm]:
        """Return the arms at a flip rate; those that follow another are where that is, too."""
        return {name: self.arms[name] for name in self.chosen if self._is_at(name, rate)}

    def _is_at(self, name: str, rate: float) -> bool:
        arm = self.arms[name]
        leaders = [other for other in (arm.matched_to, arm.tuned_as) if other is not None]
        return (arm.noise is None or rate in arm.noise) and all(self._is_at(other, rate) for other in leaders)

    def _check_arm(self, name: str, tuned: Sequence[str]) -> None:
        arm = self.arms[name]
        ways = [bool(arm.grid), arm.tuned_as is not None, arm.matched_to is not None]
        stated = {"grid": arm.grid, "tuned_as": arm.tuned_as, "matched_to": arm.matched_to}
        require(sum(ways) == 1, f"arms.{name}", stated, "exactly one of grid, tuned_as and matched_to, not empty")
        require(arm.tuned_as is None or arm.tuned_as in tuned, f"arms.{name}.tuned_as", arm.tuned_as, ", ".join(tuned))
        check_names(f"arms.{name}.grid", arm.grid)
        for key, values in arm.grid.items():
            right = isinstance(values, list) and len(values) > 1 and all(map(_positive, values))
            right = right and values == sorted(set(values))
            require(right, f"arms.{name}.grid: {key}", values, LIST)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def tuning_study(
    study: TunedStudy, rate: float, todo: Mapping[str, Iterable[Config]]
) -> tuple[LanguageStudy, dict[str, tuple[str, Config]]]:
    """Return configurations of arms as a study, an arm each, and whose they are: its arm -> arm and configuration."""
    owners, arms = {}, {}
    for name, configs in todo.items():
        own = study.arms[name]
        for config in configs:
            label = f"{name}: {own.label(config)}"
            owners[label] = name, config
            options = own.set | own.options(config) | study.tuning_set
            arms[label] = LanguageArm(set=options, without_flipped=own.without_flipped)
    tuning = LanguageStudy(
        fit=study.fit, arms=arms, noise=[rate], seeds=study.tuning_seeds, set=study.set,
        gold_columns=study.gold_columns, kls=study.kls[:1], margin=study.margin,
    )  # fmt: skip
    return tuning, owners


def evaluation_study(study: TunedStudy, rate: float, best: Mapping[str, Config]) -> LanguageStudy:
    """Return the study of the chosen configurations; arms whose choice is still open have their own options only."""
    own, arms = study.at(rate), {}
    for name, arm in own.items():
        leader = arm.tuned_as or name
        found = study.arms[leader].options(best[leader]) if leader in best else {}
        arms[name] = LanguageArm(
            set=arm.set | found, against=[other for other in arm.against if other in own], matched_to=arm.matched_to,
            without_flipped=arm.without_flipped,
        )  # fmt: skip
    return LanguageStudy(
        fit=study.fit, arms=arms, noise=[rate], seeds=study.seeds, set=study.set, gold_columns=study.gold_columns,
        kls=study.kls, margin=study.margin,
    )  # fmt: skip


def first_units(study: TunedStudy, folder: Path, device: str) -> list[Unit]:
    """Return the runs with which a study begins, those of the comparison before they are tuned.

    Raises:
        ConfigError: a run cannot be planned, or a grid names an option that its arm's configuration does not state.
    """
    found = []
    for rate in study.noise:
        untuned = plan(evaluation_study(study, rate, {}), folder, device)
        for run, *_ in untuned:
            arm = study.arms[run.arm]
            for key in study.arms[arm.tuned_as or run.arm].grid:
                allowed = "an option that `fit`, `set` or the arm's own `set` states"
                require(option(run.config, key) is not None, f"arms.{run.arm}: tuned option", key, allowed)
        todo = {name: arm.configurations() for name, arm in study.at(rate).items() if arm.grid}
        found += untuned + plan(tuning_study(study, rate, todo)[0], folder, device, first_seed=TUNING_SEED)
    return found


def add_scores(
    tried: dict[str, Tried], rows: Sequence[Row], owners: Mapping[str, tuple[str, Config]], metric: str
) -> None:
    """Add the means over seeds of new configurations; -inf where a seed's policy cannot be brought to the KL."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["arm"], []).append(row[metric])
    for label, own in values.items():
        name, config = owners[label]
        mean = math.fsum(own) / len(own)
        tried.setdefault(name, {})[config] = mean if mean == mean else -math.inf


def best_of(name: str, tried: Tried) -> Config:
    """Return the configuration with the highest mean, of equal ones the first.

    Raises:
        DataError: none has a mean.
    """
    best = max(tried, key=lambda config: tried[config])
    if tried[best] == -math.inf:
        raise DataError(f"{name}: no configuration reaches the KL of tuning on every seed; allowed: a lower first kl")
    return best


def extended(study: TunedStudy, tried: Mapping[str, Tried]) -> dict[str, list[Config]]:
    """Return what lies one step beyond the edges on which the best configurations lie, by arm."""
    found = {}
    for name, own in tried.items():
        arm = study.arms[name]
        near = [_plain(arm, config) for config in neighbourhood(arm, best_of(name, own))]
        if new := [config for config in dict.fromkeys(near) if config not in own]:
            found[name] = new
    return found


def _plain(arm: TunedArm, config: Config) -> Config:
    """Return a configuration without the last digits' noise, and whole where the grid and the value are."""
    rounded = [float(f"{value:.12g}") for value in config]
    whole = [all(isinstance(value, int) for value in axis.values) for axis in arm.axes]
    return tuple(int(x) if own and x.is_integer() else x for x, own in zip(rounded, whole, strict=True))


def tuning_table(study: TunedStudy, rate: float, tried: Mapping[str, Tried]) -> list[Row]:
    """Return every configuration with its mean, whether it was chosen, and on which edges it lies."""
    rows = []
    for name, own in tried.items():
        arm, best = study.arms[name], best_of(name, own)
        rows += [
            {"arm": name, "flip_rate": rate, "configuration": arm.label(config), "seeds": study.tuning_seeds,
             study.metric: score, "chosen": config == best, "at_edge": "; ".join(at_edges(arm, config, set(own))),
             "options": json.dumps(arm.options(config))}
            for config, score in own.items()
        ]  # fmt: skip
    return rows


def tuned_rows(study: TunedStudy, rate: float, tried: Mapping[str, Tried]) -> list[Row]:
    """Return what the report says of every tuned arm: see `Study.tuned`."""
    rows = []
    for name, own in tried.items():
        arm, best = study.arms[name], best_of(name, own)
        values = {axis.name: value for axis, value in zip(arm.axes, best, strict=True)}
        rows.append(
            {"arm": name, "rho": None, "flip_rate": rate, "configurations": len(own), "options": values,
             "at_edge": "; ".join(at_edges(arm, best, set(own))), "tuning_win_rate": own[best]}
        )  # fmt: skip
    return rows

"""Testbed S3: the runs of a study on a language model, each an ordinary `fit` with a configuration of its own."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gamma_po.errors import ConfigError, require

BARE = re.compile(r"[^a-z0-9]+")
GREEK = str.maketrans({"γ": "g", "β": "b", "τ": "t", "ε": "e"})
SECTIONS = ("data", "model", "trainer")  # of `fit`, which hold what a run cannot do without
QUIET = {  # what a run of a study leaves out, as nobody watches it and its result is a row of the table
    "trainer.enable_progress_bar": False, "checkpoint.save_top_k": 0, "checkpoint.save_last": False,
    "export.enabled": False, "report.show": 0, "pair_recorder.every_n_steps": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageArm:
    """What distinguishes an arm from the others.

    Args:
        set: options of `fit` by their dotted names, e.g. {model.margin: {class_path: KL}}.
        against: arms it is compared with.
        matched_to: an arm whose gradient weights are fitted by s(a - b h); this arm is that arm's loss at β b with
            the fixed margin a, at the same flip rates; it has no `set`, `noise` or `without_flipped` of its own.
        without_flipped: the oracle: train without the pairs whose labels are flipped, for as many steps.
        noise: only at these flip rates; null for all of the study's.
    """

    set: dict[str, Any] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    matched_to: str | None = None
    without_flipped: bool = False
    noise: list[float] | None = None


def _check_control(name: str, arm: LanguageArm) -> None:
    """Refuse options of a matched slope that would do nothing: it takes all of them from the arm it is fitted to."""
    for key, unset in {"set": {}, "noise": None, "without_flipped": False}.items():
        value = getattr(arm, key)
        allowed = f"nothing; an arm with matched_to has the options of {arm.matched_to!r}"
        require(value == unset, f"arms.{name}.{key}", value, allowed)


def check_names(owner: str, options: Mapping[str, Any]) -> None:
    """Refuse to replace a whole section, as `--set.data.train FILE` would: it is read as set: {data: {train: FILE}}."""
    for key in options:
        allowed = f"dotted names such as {key}.NAME, in YAML; {key} alone would replace the whole section"
        require(key not in SECTIONS, owner, key, allowed)


@dataclass(frozen=True, kw_only=True)
class LanguageStudy:
    """What is run.

    Args:
        fit: YAML file of an ordinary run, from which every run's configuration is derived.
        arms: by name; the first is the base loss.
        noise: shares of labels flipped, each in [0, 0.5).
        seeds: how many; a seed is that of flips, batch order, adapters and samples. All seeds have the same training
            pairs and test prompts, so intervals over seeds hold for these pairs and prompts.
        set: options of `fit` that all runs share, by their dotted names.
        gold_columns: columns of the test set with the gold rewards of its chosen and rejected completions; none where
            there are no gold rewards.
        kls: KLs at which policies are compared on the reference's answers, by rescaling; the first is in the tables.
        margin: smallest difference of interest, of win rates.
        only: run these arms, the first of `arms` among them, and leave out the others; null for all.
    """

    fit: str
    arms: dict[str, LanguageArm]
    noise: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4])
    seeds: int = 10
    set: dict[str, Any] = field(default_factory=dict)
    gold_columns: list[str] = field(default_factory=lambda: ["reward_chosen", "reward_rejected"])
    kls: list[float] = field(default_factory=lambda: [0.25, 0.05, 0.1, 0.5, 1.0])
    margin: float = 0.02
    only: list[str] | None = None

    def __post_init__(self) -> None:
        """Check what the arms say of each other."""
        require(self.seeds >= 1, "seeds", self.seeds, "an integer >= 1; intervals need 2")
        require(all(0 <= rate < 0.5 for rate in self.noise), "noise", self.noise, "rates with 0 <= rate < 0.5")
        require(len(self.gold_columns) in (0, 2), "gold_columns", self.gold_columns, "two names, or none at all")
        require(len(self.arms) >= 1, "arms", self.arms, "at least one arm, the base loss")
        allowed = "at least one KL, unless gold_columns is []"
        require(bool(self.kls) or not self.gold_columns, "kls", self.kls, allowed)
        check_names("set", self.set)
        for name in self.only or ():
            require(name in self.arms, "only", name, ", ".join(self.arms))
        allowed = f"a list with {next(iter(self.arms))!r}, the base loss, which the checks compare with"
        require(self.only is None or next(iter(self.arms)) in self.only, "only", self.only, allowed)
        for name, arm in self.chosen.items():
            check_names(f"arms.{name}.set", arm.set)
            for other in arm.against:
                require(other in self.arms, f"arms.{name}.against", other, ", ".join(self.arms))
            if arm.matched_to is not None:
                others = [own for own, its in self.chosen.items() if its.matched_to is None]
                require(arm.matched_to in others, f"arms.{name}.matched_to", arm.matched_to, ", ".join(others))
                _check_control(name, arm)

    @property
    def chosen(self) -> dict[str, LanguageArm]:
        """The arms to be run."""
        return {name: arm for name, arm in self.arms.items() if self.only is None or name in self.only}

    @property
    def base(self) -> str:
        """The base loss's arm."""
        return next(iter(self.chosen))


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run.

    Args:
        arm: name.
        flip_rate: share of labels flipped.
        seed: of the run.
        config: options of `fit`, nested; what a matched slope decides is still open.
        follows: the run whose gradient weights decide this one's slope, if it is a control.
        without_flipped: whether flipped pairs are left out.
    """

    arm: str
    flip_rate: float
    seed: int
    config: dict[str, Any] = field(repr=False)
    follows: PlannedRun | None = field(default=None, repr=False)
    without_flipped: bool = False

    @property
    def name(self) -> str:
        """A file's name, of its own also where arms differ in signs only."""
        plain = BARE.sub("-", self.arm.lower().translate(GREEK)).strip("-")
        mark = hashlib.blake2b(self.arm.encode(), digest_size=2).hexdigest()
        return f"{plain}-{mark}_noise-{self.flip_rate:g}_seed-{self.seed}"


Unit = tuple[PlannedRun, ...]  # a run and the controls that are fitted to it, in order


def plan(
    study: LanguageStudy, folder: Path, device: str = "cpu", *, first_seed: int = 0, cache: Path | None = None
) -> list[Unit]:
    """Return all runs of a study, by seed, flip rate and arm: so that an interrupted study has whole seeds.

    Args:
        study: what is run.
        folder: of the study.
        device: cpu or gpu: every run has one of them.
        first_seed: the seeds are this one and those that follow.
        cache: folder of the reference's log-probabilities; by default in the study's folder.

    Raises:
        ConfigError: the configuration cannot be read, does not say how many steps a run has, or chooses among the
            rows of its data in a way that a study cannot follow.
    """
    common = read_fit(study.fit)
    for key, value in (QUIET | study.set).items():
        put(common, key, value)
    steps = common.get("trainer", {}).get("max_steps", -1)
    allowed = "a number of steps, so that the oracle, which has fewer pairs, trains for as long as the others"
    require(steps > 0, "trainer.max_steps (of the study's `fit` or `set`)", steps, allowed)
    for key, value in {"max_epochs": -1, "accelerator": device, "devices": 1}.items():
        put(common, f"trainer.{key}", value)
    put(common, "data.cache_dir", str(cache or folder / "cache"))
    units = []
    seeds = range(first_seed, first_seed + study.seeds)
    for seed, rate, (name, arm) in itertools.product(seeds, study.noise, study.chosen.items()):
        if arm.matched_to is None and rate in (study.noise if arm.noise is None else arm.noise):
            run = PlannedRun(
                arm=name, flip_rate=rate, seed=seed, config=_derived(common, arm, rate, seed),
                without_flipped=arm.without_flipped,
            )  # fmt: skip
            check_rows(run)
            controls = [own for own, its in study.chosen.items() if its.matched_to == name]
            units.append((run, *(PlannedRun(**{**vars(run), "arm": own, "follows": run}) for own in controls)))
    return units


def share_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return every count-th unit from the index-th on.

    Raises:
        ConfigError: the index is not below the count.
    """
    require(0 <= index < count, "shard", f"{index}/{count}", "i/n with 0 <= i < n")
    return list(units[index::count])


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a nested option by its dotted name.

    >>> config = {"model": {"lora": None}}
    >>> put(config, "model.optimizer.lr", 0.1)
    >>> config
    {'model': {'lora': None, 'optimizer': {'lr': 0.1}}}
    """
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(config.get(parent), dict):
            config[parent] = {}
        config = config[parent]
    config[last] = copy.deepcopy(value)


def option(config: Mapping[str, Any], key: str) -> Any:
    """Return a nested option by its dotted name, None where it is not set.

    >>> option({"data": {"train": "a.jsonl"}}, "data.train")
    'a.jsonl'
    """
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def beta_of(run: PlannedRun) -> float:
    """β of a run's loss.

    Raises:
        ConfigError: the configuration leaves it open.
    """
    beta = option(run.config, "model.loss.init_args.beta")
    if beta is None:
        raise ConfigError(f"{run.arm}: model.loss.init_args.beta is not set; a study states the β of every arm")
    return float(beta)


def _derived(common: Mapping[str, Any], arm: LanguageArm, rate: float, seed: int) -> dict[str, Any]:
    config = copy.deepcopy(dict(common))
    for key, value in arm.set.items():
        put(config, key, value)
    put(config, "seed_everything", seed)
    if option(config, "report.num_prompts") != 0:
        put(config, "report.sampling.seed", seed)
    if rate > 0 and not arm.without_flipped:
        put(config, "data.label_noise", rate)
        put(config, "data.label_noise_seed", seed)
    return config


def check_rows(run: PlannedRun) -> None:
    """Refuse options under which pair i of a split is not row i of its file: a study joins pairs and rows by number.

    Raises:
        ConfigError: naming the option.
    """
    data = option(run.config, "data") or {}
    invalid = data.get("invalid_rows", "error")
    require(invalid == "error", f"{run.arm}: data.invalid_rows", invalid, "error; a study needs row numbers to stay")
    if not run.without_flipped:
        return
    for key in ("duplicates", "contradictions"):
        allowed = "keep or error; an arm without flipped pairs finds them by the number of their row"
        require(data.get(key, "keep") != "drop", f"{run.arm}: data.{key}", data.get(key), allowed)
    allowed = "0; an arm without flipped pairs finds them by the number of their row"
    share = data.get("validation_share", 0)
    require(not share, f"{run.arm}: data.validation_share", share, allowed)
    allowed = "a single source; an arm without flipped pairs finds them by the number of their row"
    require(isinstance(data.get("train"), str), f"{run.arm}: data.train", data.get("train"), allowed)


def read_fit(path: str) -> dict[str, Any]:
    """Return the options of an ordinary run.

    Raises:
        ConfigError: no such file, or it holds no options.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"fit={path!r}: no such file; allowed: a YAML file of options of `fit`")
    config = yaml.safe_load(file.read_text())
    require(isinstance(config, dict), "fit", path, "a YAML file of options of `fit`")
    return config

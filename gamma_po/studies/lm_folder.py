"""Testbed S3: what a study's folder is of, so that it is continued by the same study only, and each run made once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from gamma_po.data.sources import content_key
from gamma_po.errors import ConfigError
from gamma_po.files import locked, write_text
from gamma_po.packages import PACKAGE_PREFIX
from gamma_po.studies.lm_plan import LanguageStudy, PlannedRun, Unit, option, read_fit

PLAN = "plan.yaml"
SPLITS = ("train", "validation", "test")


def check_same_study(study: LanguageStudy, units: Sequence[Unit], folder: Path, device: str) -> None:
    """Note what the folder's study is; refuse to continue another one in it.

    Compared are the study's options, what the file `fit` holds, the device, and the contents of local data files.

    Raises:
        ConfigError: the folder holds something else; names what differs.
    """
    own = yaml.safe_load(yaml.safe_dump(identity(study, units, device)))  # as it will be read
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{PLAN}.lock"):  # several shares of the runs may start at once
        file = folder / PLAN
        if not file.is_file():
            if any(not path.name.startswith(f".{PLAN}.") for path in folder.iterdir()):
                raise ConfigError(
                    f"output={str(folder)!r} is neither empty nor a study's folder; allowed: a new folder"
                )
            write_text(file, yaml.safe_dump(own, allow_unicode=True, sort_keys=False))
        found = yaml.safe_load(file.read_text())
    if found != own:
        names = ", ".join(different(found, own))
        raise ConfigError(
            f"{file} is of a study with other options, which differ in {names}; allowed: the same, or another output"
        )


def identity(study: LanguageStudy, units: Sequence[Unit], device: str) -> dict[str, Any]:
    """Return what makes two studies the same, as plain values."""
    plain = {own.name: getattr(study, own.name) for own in fields(study)}
    plain["arms"] = {name: dict(vars(arm)) for name, arm in study.arms.items()}
    return plain | {"device": device, "fit_options": read_fit(study.fit), "data": _contents(units)}


def different(one: Any, other: Any) -> list[str]:
    """Name the first-level entries in which two plans differ.

    >>> different({"seeds": 2, "device": "cpu"}, {"seeds": 3, "device": "cpu"})
    ['seeds']
    """
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return ["everything"]
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _contents(units: Iterable[Unit]) -> dict[str, str]:
    """A key of the contents of every local data file of the runs, by the name of the source."""
    found = [option(run.config, f"data.{split}") for unit in units for run in unit for split in SPLITS]
    paths: dict[str, None] = {}
    for source in found:
        for part in source if isinstance(source, list) else [source]:
            path = part.get("path") if isinstance(part, Mapping) else part
            if isinstance(path, str) and (path.startswith(PACKAGE_PREFIX) or Path(path).expanduser().is_file()):
                paths[path] = None
    return {path: content_key(path) for path in paths}


@contextlib.contextmanager
def claimed(folder: Path, run: PlannedRun) -> Iterator[None]:
    """Hold a run for this process; another one that wants it waits until its result is there."""
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with locked(folder / "locks" / f"{run.name}.lock"):
        yield

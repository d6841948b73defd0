"""What the command line says about itself: what is allowed where something is not, and what must not pass silently."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gamma_po.errors import ConfigError
from gamma_po.evaluation.gold import GoldReward
from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS, KLPool, KLSolver
from gamma_po.margins.maps import MapShape

SEEDS = "an integer, 0 <= seed_everything < 2**32"
NESTING = ("class_path", "init_args")
PARTS: dict[str, type] = {"shape": MapShape, "solver": KLSolver, "pool": KLPool}  # of a margin, by their keys
CLASS_KEY = re.compile(r"model\.(?:loss|margin)(?:\.(?:inner|shape|solver|pool))*")


def class_names() -> dict[str, list[str]]:
    """Return what may stand behind each injectable key."""
    margins = [entry.__name__ for entry in MARGINS.values()]
    return {
        "loss": [entry.__name__ for entry in LOSSES.values()],
        "margin": margins,
        "inner": margins,
        "gold": [judge.__name__ for judge in GoldReward.__subclasses__()],
        **{key: [part.__name__ for part in base.__subclasses__()] for key, base in PARTS.items()},
    }


# --- errors ---------------------------------------------------------------------------------------------------


def explain(message: str, *, options: Sequence[str], of_class: type | None) -> str:
    """Rewrite a parsing error so that it names the key, the value and what is allowed.

    Args:
        message: jsonargparse's.
        options: the names that the failing parser knows, e.g. "model.loss" or, inside a class, "beta".
        of_class: the loss, margin or other class whose options were being parsed.
    """
    owner = "" if of_class is None else f"{of_class.__name__}."
    if found := re.search(r"^Option '([^']+)' is not accepted", message):
        name = "this command" if of_class is None else of_class.__name__
        return f"{name} does not use the option {found[1]!r}; {_allowed(found[1], options)}"
    if found := re.search(r"does not accept option '([^']+)'", message):
        return f"unknown key {found[1]!r}; {_allowed(found[1], options)}"
    if found := re.search(r"^Unexpected config: (.*)", message, re.DOTALL):
        what = " ".join(found[1].split())[:60] or "nothing"
        return f"--config: a file must hold keys with values, e.g. `data: {{train: pairs.jsonl}}`, found {what}"
    if found := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        unknown = [word.partition("=")[0][2:] for word in found[1].split() if word.startswith("--")]
        return "\n".join(
            [f"unrecognized arguments: {found[1]}", *(f"{key}: {_allowed(key, options)}" for key in unknown)]
        )
    if found := re.search(r"arguments are required: (.*)", message):
        names = [f"--{name.strip().removeprefix('fit.')}" for name in found[1].split(",")]
        return f"{', '.join(names)}: required, on the command line or in a file that --config names"
    if found := re.search(r'^Parser key "seed_everything":.*Got value: (.*)', message, re.DOTALL):
        return f"seed_everything={found[1].strip()}: give {SEEDS}"
    if found := re.search(r'^Parser key "([^"]+)":(.*)', message, re.DOTALL):
        return _explain_value(owner + found[1], found[2])
    return message


def refusal(message: str) -> str:
    """Return what a class has said against its options, without what jsonargparse says around it.

    >>> refusal("Does not validate\\nErrors:\\n  - lora.r=0 is not allowed\\n  - Expected a ...\\nGiven value: ...")
    'lora.r=0 is not allowed'
    """
    if "\nErrors:\n" not in message:
        return message
    lines = message.split("\nErrors:\n")[1].split("\nGiven value")[0].splitlines()
    return " ".join(line.strip().removeprefix("- ") for line in lines if not line.startswith("  - Expected a"))


def _explain_value(key: str, problem: str) -> str:
    unknown = re.search(r"Expected a dot import path string: (\S+)", problem)
    if unknown and "Expected a <class 'float'>" in problem:
        return f"{key}: Expected a float. Got value: {unknown[1]}"
    names = class_names().get(key.rpartition(".")[2])
    if unknown and names:
        return f"{key}: unknown name {unknown[1]!r}; allowed: {', '.join(names)}"
    if unknown:
        return f"{key}: unknown name {unknown[1]!r}; allowed: the full name of a class, e.g. torch.optim.AdamW"
    tidy = re.sub(r"<class '(\w+)'>", r"\1", " ".join(problem.split()))
    return f"{key}: {tidy}" + (f"; allowed: {', '.join(names)}" if names else "")


def _allowed(key: str, options: Sequence[str]) -> str:
    """What stands beside a wrong key: options that end with it, or the children of the part of it that is right."""
    parts = key.split(".")
    deeper = sorted(option for option in options if option.endswith(f".{key}"))
    if deeper and key not in options:
        return f"did you mean {' or '.join(deeper)}?"
    for depth in range(len(parts) - 1, -1, -1):
        prefix = ".".join([*parts[:depth], ""])
        children = sorted({o.removeprefix(prefix).split(".")[0] for o in options if o.startswith(prefix)} - {"help"})
        if children:
            close = difflib.get_close_matches(parts[depth], children, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            return f"{hint}allowed{f' in {prefix[:-1]}' if prefix else ''}: {', '.join(children)}"
    return "it has no options"


# --- options carried from one class to another ------------------------------------------------------------------


def check_carried_options(arguments: Sequence[str]) -> None:
    """Refuse a change of loss or margin that would silently keep options written for the other one.

    Settings merge in their order, files as well as the command line. Where a later one names another class,
    options of the same name stay: β of DPO would become β of SimPO.

    Raises:
        ConfigError: naming the option, both classes and how to say what is meant.
    """
    classes: dict[str, str] = {}
    written: dict[tuple[str, str], tuple[str, Any]] = {}  # (key, option) -> for which class, value
    for key, value in _settings(arguments):
        found = CLASS_KEY.match(key)
        if found is None:
            continue
        option = key[found.end() :].removeprefix(".")
        if option:
            written[found[0], option] = (classes.get(found[0], ""), value)
        elif isinstance(value, str):
            classes[found[0]] = value.rpartition(".")[2]
    for (key, option), (before, value) in written.items():
        now = classes.get(key, "")
        fields, field = _fields(now), option.partition(".")[0]
        if before and before != now and field in fields and _in_use(key, classes):
            raise ConfigError(
                f"{key} changes from {before} to {now}, and {option}={value}, which was written for {before}, would "
                f"stay in force (default of {now}: {fields[field]}); say what you mean with --{key}.{option} VALUE"
            )


def _in_use(key: str, classes: dict[str, str]) -> bool:
    """Whether the classes around a nested key still have it."""
    parent, _, name = key.rpartition(".")
    return parent == "model" or (name in _fields(classes.get(parent, "")) and _in_use(parent, classes))


def _fields(name: str) -> dict[str, Any]:
    """The options of a class with their defaults."""
    parts = [part for base in PARTS.values() for part in base.__subclasses__()]
    for entry in [*LOSSES.values(), *MARGINS.values(), *parts]:
        if entry.__name__ == name:
            return {field.name: field.default for field in dataclasses.fields(entry)}
    return {}


def check_config_files(arguments: Sequence[str]) -> None:
    """Name a configuration file that is no YAML, which the parser would not.

    Raises:
        ConfigError: naming the file, and the line where it breaks.
    """
    for key, value in _options(arguments):
        path = os.path.expanduser(value)
        if key != "config" or not os.path.isfile(path):
            continue
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {value}: not valid YAML in UTF-8: {' '.join(str(error).split())}") from error


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of a command line, in their order."""
    for place, word in enumerate(arguments):
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            yield key, value if equals else following
        elif word.startswith("-c"):
            yield "config", word[2:].removeprefix("=") or following


def _settings(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) in the order in which they come into force."""
    for key, value in _options(arguments):
        if key == "config":
            yield from _flat("", _content(value, Path()))
        elif key == "model" or CLASS_KEY.match(key):
            plain = ".".join(part for part in key.split(".") if part not in NESTING)
            yield from _flat(plain, _content(value, Path()) if _takes_mapping(plain) else (value, Path()))


def _takes_mapping(key: str) -> bool:
    """Whether a file or a mapping may stand where the value of `key` is expected."""
    return key in ("", "model") or CLASS_KEY.fullmatch(key) is not None


def _content(value: str, folder: Path) -> tuple[Any, Path]:
    """What a file's name or a text stands for, and the folder from which names in it are read.

    What is wrong with a file is for the parser to say.
    """
    try:
        path = folder / Path(value).expanduser()
        if path.is_file():
            return yaml.safe_load(path.read_text()), path.parent
        return yaml.safe_load(value), folder
    except (OSError, RuntimeError, UnicodeDecodeError, yaml.YAMLError):  # RuntimeError: ~nobody
        return {}, folder


def _flat(key: str, content: tuple[Any, Path]) -> Iterator[tuple[str, Any]]:
    """Turn nested mappings, and files named in them, into dotted keys; a class comes before its options."""
    value, folder = content
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in sorted(value.items(), key=lambda item: item[0] != "class_path"):
        own = key if name in NESTING else f"{key}.{name}".removeprefix(".")
        is_name = isinstance(inner, str) and name != "class_path" and _takes_mapping(own)
        yield from _flat(own, _content(inner, folder) if is_name else (inner, folder))

"""The registries as tables for the terminal."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS, GammaBetaRatio, KLPool, KLSolver
from gamma_po.margins.maps import MapShape
from gamma_po.presets import PRESETS

PARTS = {  # of margins: title, which there are
    "map shapes: γ as a function of z, the option `shape` of map": MapShape.__subclasses__,
    "solvers of the KL margin: the option `solver` of kl": KLSolver.__subclasses__,
    "pools of the KL margin: the option `pool` of kl": KLPool.__subclasses__,
    "ratios to β: {gamma_beta_ratio: 0.4} for a number in `gamma0` and `gamma`": lambda: [GammaBetaRatio],
}
SYMBOLS = {  # of formulas: how they look there, what they are
    r"\bh\b": "h: reward margin",
    r"ℓ": "ℓ(x) = -log s(x)",
    r"ℓ|\bs\(": "s(x) = 1/(1 + e^-x)",
    r"\ba[/0]|\bb\b": "a, b: log π of the chosen and rejected completion, summed over its tokens",
    r"\ba0": "a0, b0: those of the reference",
    r"\bn_[wl]\b": "n_w, n_l: their numbers of tokens",
    r"\b_?r(_[wl])?\b": "r_w = a - a0, r_l = b - b0",
    r"\bR(_[wl])?\b": "R: reward of one completion",
    r"\bg\(": "g: the option `shape`",
    r"\bz\b": "z: how far from the average, in deviations (with map: as the option `standardize` says)",
    r"\bq\b": "q: share of γ0",
    r"\brelu\b": "relu(x) = max(0, x)",
    r"\bexpm1\b": "expm1(x) = e^x - 1",
}
OPTION = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


def registry_table(command: str) -> Table:
    """Return the table of `losses` or `margins`: name, class, formula, source; with a legend of the symbols."""
    title = f"{command} (γ, h in reward units; nats; other Greek letters: options, see below)"
    table = _empty_table(title, "name", "class in YAML", "formula", "source")
    table.caption = legend(*(entry.formula for entry in _registry(command).values()))
    for name, entry in _registry(command).items():
        table.add_row(*map(Text, (name, entry.__name__, entry.formula, entry.source)))
    return table


def legend(*formulas: str) -> str:
    """Return what the symbols mean that occur in formulas.

    >>> legend("ℓ(h-γ)")
    'h: reward margin; ℓ(x) = -log s(x); s(x) = 1/(1 + e^-x)'
    """
    return "; ".join(meaning for looks, meaning in SYMBOLS.items() if any(re.search(looks, one) for one in formulas))


def option_table(command: str) -> Table:
    """Return the options of `losses` or `margins`: whose, option, default, range with unit and meaning."""
    return _options(f"options of {command}", _registry(command))


def part_tables() -> list[Table]:
    """Return the tables of what margins are made of: map shapes with their formulas, solvers, pools and ratios to β."""
    tables = []
    for title, which in PARTS.items():
        parts = {part.__name__: part for part in which()}
        table = _empty_table(title, "class in YAML", "what it is")
        table.caption = legend(*(getattr(part, "formula", "") for part in parts.values())) or None
        for name, part in parts.items():
            table.add_row(Text(name), Text(getattr(part, "formula", first_line(part))))
        tables += [table, _options(f"options of {title.partition(':')[0]}", parts)]
    return tables


def preset_table() -> Table:
    """Return the table of ready-made pairs: name, loss, margin, source."""
    table = _empty_table("presets (γ0 and γ in reward units)", "name", "loss", "margin", "source")
    for name, method in PRESETS.items():
        table.add_row(*map(Text, (name, repr(method.loss), repr(method.margin), method.source)))
    return table


def write_table(command: str) -> int:
    """Write the tables of `losses`, `margins` or `presets` to the terminal."""
    tables = [preset_table()] if command == "presets" else [registry_table(command), option_table(command)]
    for table in tables + (part_tables() if command == "margins" else []):
        Console().print(table)
    return 0


def option_meanings(entry: type) -> dict[str, str]:
    """Return what the options of a class mean, from the `Args` of its docstring and of those it inherits from.

    >>> option_meanings(MARGINS["amapo"])
    {'beta': 'β > 0, reward units per nat. If not given: that of the loss it is used with.'}
    """
    found: dict[str, str] = {}
    for owner in entry.__mro__:
        for names, text in _arguments(inspect.cleandoc(owner.__doc__ or "")):
            if not text.startswith("see `"):
                found = dict.fromkeys(names, text) | found
    return {field.name: found[field.name] for field in dataclasses.fields(entry) if field.name in found}


def first_line(entry: type) -> str:
    """Return the first line of a class's docstring."""
    return inspect.cleandoc(entry.__doc__ or "").splitlines()[0]


def _arguments(document: str) -> list[tuple[list[str], str]]:
    """Names and text of every entry under `Args:`."""
    _, _, arguments = document.partition("\nArgs:\n")
    entries: list[tuple[list[str], str]] = []
    for line in arguments.partition("\n\n")[0].splitlines():
        if found := OPTION.fullmatch(line):
            entries.append((found[1].split(", "), found[2]))
        elif entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
    return entries


def _registry(command: str) -> Mapping[str, type]:
    return {"losses": LOSSES, "margins": MARGINS}[command]


def _options(title: str, entries: Mapping[str, type]) -> Table:
    table = _empty_table(title, "of", "option", "default", "range, unit and meaning")
    for name, entry in entries.items():
        meanings = option_meanings(entry)
        for field in dataclasses.fields(entry):
            table.add_row(*map(Text, (name, field.name, _default(field), meanings.get(field.name, ""))))
    return table


def _empty_table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)

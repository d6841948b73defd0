"""The registries as tables for the terminal."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS
from gamma_po.presets import PRESETS


def registry_table(command: str) -> Table:
    """Return the table of `losses` or `margins`: name, class, formula, options with defaults, source."""
    registry = {"losses": LOSSES, "margins": MARGINS}[command]
    title = f"{command} (γ, h in reward units; nats; ε, β, λ as in the papers)"
    table = _empty_table(title, "name", "class in YAML", "formula", "options = default", "source")
    for name, entry in registry.items():
        options = ", ".join(f"{field.name} = {_default(field)}" for field in dataclasses.fields(entry))
        table.add_row(*map(Text, (name, entry.__name__, entry.formula, options or "-", entry.source)))
    return table


def preset_table() -> Table:
    """Return the table of ready-made pairs: name, loss, margin, source."""
    table = _empty_table("presets (γ0 and γ in reward units)", "name", "loss", "margin", "source")
    for name, method in PRESETS.items():
        table.add_row(*map(Text, (name, repr(method.loss), repr(method.margin), method.source)))
    return table


def write_table(command: str) -> int:
    """Write the table of `losses`, `margins` or `presets` to the terminal."""
    Console().print(preset_table() if command == "presets" else registry_table(command))
    return 0


def _empty_table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)

"""The registries as tables for the terminal."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table

from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS


def registry_table(command: str) -> Table:
    """Return the table of `losses` or `margins`: name, class, formula, options with defaults, source."""
    registry = {"losses": LOSSES, "margins": MARGINS}[command]
    table = Table(title=f"{command} (γ, h in reward units; nats; ε, β, λ as in the papers)", box=box.SIMPLE_HEAD)
    for column in ("name", "class in YAML", "formula", "options = default", "source"):
        table.add_column(column, overflow="fold")
    for name, entry in registry.items():
        options = ", ".join(f"{field.name} = {_default(field)}" for field in dataclasses.fields(entry))
        table.add_row(name, entry.__name__, entry.formula, options or "-", entry.source)
    return table


def write_table(command: str) -> int:
    """Write a registry's table to the terminal."""
    Console().print(registry_table(command))
    return 0


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return repr(field.default)

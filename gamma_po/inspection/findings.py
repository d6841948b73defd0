"""What an inspection has found, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.text import Text

Level = Literal["fails", "likely wrong", "note"]
STYLES = {"fails": "bold red", "likely wrong": "red", "note": "yellow"}


class Finding(NamedTuple):
    """Something worth knowing before the run."""

    level: Level  # the run would stop; it would run and probably not do what is meant; or neither
    problem: str
    change: str  # what to do about it


def blocking(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that speak against starting the run.

    >>> blocking([Finding("note", "no validation split", "set data.validation")])
    []
    """
    return [finding for finding in findings if finding.level != "note"]


def verdict(findings: Sequence[Finding]) -> Text:
    """Return all findings, the worst first, and what follows from them."""
    text = Text()
    for level, style in STYLES.items():
        for finding in findings:
            if finding.level == level:
                text.append(f"{level}: ", style=style)
                text.append(f"{finding.problem}\n")
                text.append(f"    change: {finding.change}\n", style="dim")
    count = len(blocking(findings))
    if count:
        text.append(f"not ready: {count} finding(s) to look at first", style="bold red")
    else:
        text.append("ready: nothing speaks against this run", style="bold green")
    return text

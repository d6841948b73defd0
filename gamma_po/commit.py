"""Which source a run was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str:
    """Return the source tree's commit, with a mark where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()

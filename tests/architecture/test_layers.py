"""Imports point one way: from adapters and entry points to mathematics, never back."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gamma_po"

LAYERS = {
    "types": 0, "errors": 0, "commit": 0, "files": 0, "packages": 0, "progress": 0, "registry": 0, "rundirs": 0,
    "schedules": 0, "__init__": 0,
    "logps": 1, "rewards": 1, "links": 1, "state": 1, "losses": 1, "margins": 1, "statistics": 1, "ranks": 1,
    "presets": 1, "objective": 1,
    "layouts": 2, "attention": 2, "fused_lora": 2, "scorer": 2, "miniatures": 2, "forwards": 2, "policies": 2,
    "fingerprints": 2, "adapters": 2, "sharding": 2, "flat_sharding": 2, "weight_files": 2, "saved": 2, "shards": 2,
    "runs": 2, "model_card": 2, "bases": 2, "reference": 2, "data": 2, "evaluation": 2, "plotting": 2, "tables": 2,
    "studies": 2,
    "checkpoints": 3, "ckpt_path": 3, "resuming": 3, "whole_steps": 3, "continuation": 3, "optimizers": 3,
    "placement": 3, "scoring": 3, "module": 3, "callbacks": 3, "inspection": 3,
    "commands": 4, "parsing": 4, "cli": 4, "__main__": 4,
}  # fmt: skip
MATHEMATICS_MAY_IMPORT = {"torch", "math", "gamma_po"}
LIGHTNING_ROOMS = {
    "checkpoints", "resuming", "whole_steps", "continuation", "optimizers", "placement", "scoring", "module",
    "callbacks", "cli", "commands",
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """Absolute names that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(file: Path) -> str:
    """The part of the package a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    """All files of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_layer_and_imports_only_lower_or_equal_ones() -> None:
    for file in files():
        for name in imports(file):
            if name.startswith("gamma_po."):
                target = name.split(".")[1]
                if target == "__version__":
                    continue
                assert LAYERS[target] <= LAYERS[room(file)], f"{file.relative_to(ROOT)} imports {name}"


def test_the_mathematics_needs_torch_only() -> None:
    standard = {"__future__", "abc", "collections", "contextlib", "dataclasses", "typing"}
    standard |= {"inspect", "warnings", "functools"}
    for file in files():
        if LAYERS[room(file)] == 1:
            for name in imports(file):
                assert name.split(".")[0] in MATHEMATICS_MAY_IMPORT | standard, f"{file.relative_to(ROOT)}: {name}"


def test_lightning_stays_in_its_rooms() -> None:
    for file in files():
        if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in imports(file)):
            inside = room(file) in LIGHTNING_ROOMS or file.name == "datamodule.py"
            assert inside, f"{file.relative_to(ROOT)} imports lightning"


def test_only_ranks_and_sharding_talk_to_other_processes() -> None:
    for file in files():
        if file.name not in ("ranks.py", "sharding.py", "flat_sharding.py", "shards.py"):  # the last reads their files
            assert "torch.distributed" not in file.read_text(), f"{file.relative_to(ROOT)}"


def test_no_room_is_called_after_nothing() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [file for file in files() if set(file.relative_to(PACKAGE).with_suffix("").parts) & banned]

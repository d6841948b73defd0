"""Every experiment file opens with its command, its sources and its result, is short, and is understood."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gamma_po.cli import PreferenceCLI

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_file_is_short_says_what_it_is_and_parses(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len(lines) - len(head) <= 25
    assert any("Numbers:" in line for line in head) and any("Measured:" in line for line in head)
    (command,) = [line[1:].strip() for line in head if "python -m gamma_po" in line]
    assert str(path.relative_to(ROOT)) in command
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        PreferenceCLI([*shlex.split(command)[3:], "--print_config"])
    assert stop.value.code == 0 and "class_path" in capsys.readouterr().out

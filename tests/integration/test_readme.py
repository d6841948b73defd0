"""What the README says works as it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import gamma_po
from gamma_po import rewards
from gamma_po.__main__ import USAGE, main
from gamma_po.cli import PreferenceCLI
from gamma_po.losses import PairwiseLoss, build_loss
from gamma_po.margins import build_margin
from tests.contracts import random_evidence

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python -m gamma_po")
]


def status_of(command: Callable[[], int]) -> int:
    """What a command returns, or exits with."""
    try:
        return command()
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[3:]
    if words[0] in ("losses", "margins", "presets"):
        assert main(words) == 0
    elif words[0] in ("inspect", "generate", "export", "evaluate", "study"):
        assert status_of(lambda: main([*words, "--print_config"])) == 0
        return
    else:
        with pytest.raises(SystemExit) as stop:
            PreferenceCLI([*words, "--print_config"])
        assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 500


def test_the_readme_has_its_commands_and_both_installations_name_the_same_requirements() -> None:
    assert len(COMMANDS) >= 6
    installs = [block for language, block in BLOCKS if language == "bash" and "pip install" in block]
    assert len(installs) == 2 and all("-r requirements.txt" in block for block in installs)


def test_the_measured_result_and_its_pictures_are_there() -> None:
    section = README.split("## What you should see")[1].split("\n## ")[0]
    assert "implicit-reward accuracy" in section and "experiments/LOG.md" in section
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_ten_line_loss_is_a_loss() -> None:
    (code,) = [block for language, block in BLOCKS if language == "python" and "PairwiseLoss" in block]
    scope = {"dataclass": dataclass, "PairwiseLoss": PairwiseLoss, "rewards": rewards, "torch": torch}
    exec(code, scope)
    target_margin = torch.linspace(0, 2, 6, dtype=torch.float64)
    loss = scope["Hinge"](beta=0.1)(random_evidence(), target_margin)
    torch.testing.assert_close(loss, build_loss("hinge", beta=0.1)(random_evidence(), target_margin))


def test_the_margin_without_language_models_runs() -> None:
    (code,) = [block for language, block in BLOCKS if language == "python" and "build_margin" in block]
    scope = {"reward_margin": torch.randn(5), "evidence": random_evidence(5), "build_margin": build_margin}
    exec(code, scope)
    assert scope["target_margin"].shape == (5,)


def test_the_tree_names_every_file_of_the_package_and_nothing_else() -> None:
    (tree,) = [
        block for language, block in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if "gamma_po/\n" in block
    ]
    inside = tree.split("experiments/")[0]
    named = set(re.findall(r"\b([\w/]+(?:\.py|/))(?= |,|$)", inside, re.MULTILINE)) - {"gamma_po/"}
    package = Path(gamma_po.__file__).parent
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert named - {"data/quickstart/"} == there


def test_help_names_every_command_without_heavy_imports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == USAGE
    assert main(["fitt"]) == 2
    assert "unknown command 'fitt'; allowed: fit, validate" in capsys.readouterr().err

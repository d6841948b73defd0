"""The model card of an exported policy: what it is, its data, loss, margin and metrics, and the command behind it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gamma_po.losses import LOSSES
from gamma_po.margins import MARGINS
from gamma_po.packages import PACKAGE_PREFIX
from gamma_po.runs import run_config
from gamma_po.saved import Opened

HUGGING_FACE, LOAD = "from transformers import AutoModelForCausalLM", "AutoModelForCausalLM.from_pretrained"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
METHOD = "[γ-PO](https://arxiv.org/abs/2506.03690)'s program `gamma_po`"
MEASURES = {
    "accuracy_reference": "pair accuracy of the reference",
    "accuracy_policy": "pair accuracy of the policy",
    "reward_accuracy": "accuracy of the implicit reward",
    "reward_margin": "reward margin",
    "gold_reference": "gold reward of the reference's samples",
    "gold_policy": "gold reward of the policy's samples",
    "win_rate": "win rate against the reference",
    "kl": "KL to the reference, nats per sequence",
}


class Record(NamedTuple):
    """What a run directory says about a run; empty where there is none."""

    config: dict[str, Any]
    run: dict[str, Any]  # run.json
    report: dict[str, Any]  # report.json
    metrics: dict[str, str]  # the last values of metrics.csv

    @classmethod
    def of(cls, run: Path | None) -> Record:
        """Read a run directory."""
        if run is None:
            return cls({}, {}, {}, {})
        return cls(run_config(run), _json(run / "run.json"), _json(run / "report.json"), _last(run / "metrics.csv"))


def model_card(name: str, opened: Opened, *, is_adapter: bool, steps: int) -> str:
    """Return the card as Markdown with the hub's header.

    Args:
        name: of the exported folder.
        opened: the policy, as loaded from its checkpoint.
        is_adapter: an adapter was exported, not a whole model.
        steps: optimizer steps of the checkpoint.
    """
    record, base = Record.of(opened.run), opened.start.path
    kind = "A LoRA adapter for" if is_adapter else "A model tuned from"
    on_hub = HUB_NAME.fullmatch(base) and not base.endswith(".gguf") and not Path(base).exists()
    header = {
        **({"base_model": base} if on_hub else {}),  # the hub refuses a card with any other
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["preference-optimization", "gamma-po"],
    }
    if opened.start.adapter is not None:
        base_text = f"{code(base)} with the adapter {code(opened.start.adapter)} merged into it"
    else:
        base_text = code(base)
    parts = [
        f"---\n{yaml.safe_dump(header, allow_unicode=True)}---\n\n# {name}\n",
        f"{kind} {base_text}, trained on preference pairs with {METHOD}.\n",
        section("Method", [*_method(opened.hyper_parameters), ("optimizer steps", str(steps))]),
        section("Data", _data(record.config.get("data") or {})),
        section("Metrics, at the end of the run", _metrics(record)),
        section("Origin", _origin(record)),
        "## How to load\n\n" + _loading(base, is_adapter, opened.start.adapter is not None),
    ]
    return "\n".join(parts)


def section(title: str, rows: list[tuple[str, str]]) -> str:
    """Return a section with a table, or a word that nothing is known."""
    if not rows:
        return f"## {title}\n\nNot recorded.\n"
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows)
    return f"## {title}\n\n| | |\n| --- | --- |\n{lines}"


def code(value: object) -> str:
    """Return a value as code that cannot break out of its table cell.

    >>> code("a|b")
    '`a\\\\|b`'
    """
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def _method(hyper_parameters: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, registry in (("loss", LOSSES), ("margin", MARGINS)):
        settings = hyper_parameters.get(key)
        if settings is None:
            continue
        name = str(settings["class_path"]).rpartition(".")[2]
        options = ", ".join(f"{option}={_short(value)}" for option, value in settings.get("init_args", {}).items())
        rows.append((key, code(f"{name}({options})")))
        known = [entry for entry in registry.values() if entry.__name__ == name]
        rows += [(f"{key}, formula", f"{code(entry.formula)} ({entry.source})") for entry in known]
    for key in ("lora", "optimizer", "schedule", "warmup_ratio", "reference", "reference_model", "seed"):
        if hyper_parameters.get(key) is not None:
            rows.append((key.replace("_", " "), code(_short(hyper_parameters[key]))))
    return rows


def _short(value: Any) -> str:
    """Nested settings in the form Class(option=value)."""
    if not isinstance(value, dict):
        return str(value)
    inner = ", ".join(f"{key}={_short(item)}" for key, item in value.get("init_args", value).items())
    return f"{str(value.get('class_path', '')).rpartition('.')[2]}({inner})"


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(split, code(data[split])) for split in ("train", "validation", "test") if data.get(split) is not None]
    if not rows:
        return []
    noted = ("limit_train", "label_noise", "label_noise_seed", "columns", "tokenization", "batch_size", "layout")
    return rows + [(key.replace("_", " "), code(_short(data[key]))) for key in noted if data.get(key) is not None]


def _metrics(record: Record) -> list[tuple[str, str]]:
    rows = []
    for group in ("pairs", "samples"):
        for key, value in (record.report.get(group) or {}).items():
            if key in MEASURES and isinstance(value, dict):
                interval = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
                rows.append((MEASURES[key], interval))
    rows += [(code(key), value) for key, value in record.metrics.items() if key.startswith("val/")]
    return rows


def _origin(record: Record) -> list[tuple[str, str]]:
    if not record.run:
        return []
    command = "python -m gamma_po " + shlex.join(map(str, record.run.get("command", [])[1:]))
    versions = ", ".join(f"{name} {version}" for name, version in record.run.get("versions", {}).items())
    return [("command", code(command)), ("commit", code(record.run.get("commit"))), ("versions", code(versions))]


def _loading(base: str, is_adapter: bool, on_start: bool) -> str:
    """How to load the folder; an adapter that was trained on another one needs that one merged first."""
    chat = "python -m gamma_po generate --policy THIS_FOLDER --interactive"
    ours = base.startswith(PACKAGE_PREFIX) or base.endswith(".gguf")  # what transformers cannot load by its name
    if not is_adapter:
        lines = [
            HUGGING_FACE,
            f'model = {LOAD}("THIS_FOLDER")',
        ]
    else:
        lines = [
            "from peft import PeftModel",
            "from gamma_po.policies import ModelConfig, load_model" if ours else HUGGING_FACE,
            f"base = load_model(ModelConfig(path={base!r}))" if ours else f"base = {LOAD}({base!r})",
            *(['base = PeftModel.from_pretrained(base, "THIS_FOLDER/start").merge_and_unload()'] if on_start else []),
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
    return "```python\n" + "\n".join(lines) + f"\n```\n\nor talk to it: {code(chat)}\n"


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a run directory; what a crash has cut is no record."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last(path: Path) -> dict[str, str]:
    """The last value of each column of a run's metrics."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {key: value for row in csv.DictReader(file) for key, value in row.items() if key and value}

"""What people get wrong around a run, and the message each gets: one line of ours, never a traceback, nothing lost.

The tables of rows, files, templates, sources and configurations are in `test_bad_input.py`; here are configuration
files, models, tokenizers, checkpoints, options that would do nothing, interrupted caches, full disks and second runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from gamma_po.__main__ import main
from gamma_po.checkpoints import save_whole
from gamma_po.data import pair_files
from gamma_po.data.columns import Columns
from gamma_po.data.pair_files import Reading, pair_file
from gamma_po.data.tokenization import Tokenization
from tests.integration import test_bad_input as others
from tests.runs import arguments, steps_of
from tests.tiny import save_tiny_model, tiny_rows, tiny_tokenizer, write_rows

ANOTHER = "allowed: the tokenizer that belongs to the model"


class Place(NamedTuple):
    """Where a case happens."""

    folder: Path  # of this case
    model: str  # a good one
    checkpoint: Path  # a finished one, of the run that is given

    def file(self, name: str, content: str | bytes) -> str:
        """Write a file; return its path."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def changed_model(self, change: Callable[[Path], object]) -> str:
        """A copy of the model, spoilt."""
        folder = self.folder / "model"
        shutil.copytree(self.model, folder)
        change(folder)
        return str(folder)


class Case(NamedTuple):
    """What the user gave, and what the message must say."""

    given: Callable[[Place], list[str]]
    says: tuple[str, ...]
    status: int = 2


def config(name: str, content: str | bytes) -> Callable[[Place], list[str]]:
    return lambda place: ["--config", place.file(name, content)]


def options(*words: str) -> Callable[[Place], list[str]]:
    return lambda place: list(words)


def model(change: Callable[[Path], object]) -> Callable[[Place], list[str]]:
    return lambda place: ["--model.policy.path", place.changed_model(change)]


def checkpoint(content: bytes | Callable[[Place], bytes]) -> Callable[[Place], list[str]]:
    def give(place: Place) -> list[str]:
        return ["--ckpt_path", place.file("some.ckpt", content(place) if callable(content) else content)]

    return give


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Runs:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch this-was-run",)


def half(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:2000])


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change keys of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def with_words(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"good {number}" for number in range(8)] + ["good"])
    tokenizer.save_pretrained(folder)


def with_padding(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(320 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(folder)


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rated(gap: float, *words: str, split: str = "train") -> Callable[[Place], list[str]]:
    """A column margin; in one split, row 30 has this number in place of a rating gap."""

    def given(place: Place) -> list[str]:
        rows = [row | {"gap": 1.0 + i % 3} for i, row in enumerate(tiny_rows(32))]
        good = str(write_rows(place.folder / "rated.jsonl", rows))
        rows[29]["gap"] = gap
        bad = str(write_rows(place.folder / "bad.jsonl", rows))
        files = {"train": good, "validation": good, "test": good} | {split: bad}
        data = [word for name, file in files.items() for word in (f"--data.{name}", file)]
        return ["--data.columns.margin", "gap", "--model.margin", "Column", *words, *data]

    return given


def reversed_column(place: Place) -> list[str]:
    margin = '{"class_path": "Reverse", "init_args": {"inner": {"class_path": "Column", "init_args": TRANSFORM}}}'
    words = rated(-1.0)(place)
    words[words.index("Column")] = margin.replace("TRANSFORM", '{"transform": "log"}')
    return words


LOG = ("--model.margin.transform", "log")
CASES: dict[str, Case] = {
    # numbers that the margin cannot take
    "a rating gap of zero": Case(
        rated(0.0, *LOG),
        ("bad.jsonl, row 30 (line 30): the margin column gives 0, which the margin Column(", "> 0 with"),
    ),
    "a rating gap of zero in validation": Case(
        rated(0.0, *LOG, split="validation"), ("bad.jsonl, row 30 (line 30): the margin column gives 0, which",)
    ),
    "a number beyond 32 bits, turned by noise": Case(
        rated(1e300, "--data.label_noise", "1"),
        ("row 30 (line 30): the margin column gives -inf, its sign turned by data.label_noise, which", "32 bits"),
    ),
    "a negative gap under reverse": Case(reversed_column, ("row 30 (line 30): the margin column gives -1, which",)),
    "logarithms of noise": Case(
        rated(1.0, *LOG, "--data.label_noise", "0.3"),
        ("data.label_noise=0.3 is not allowed; allowed: 0 with the margin Column(", "turns the sign of the margin"),
    ),
    # configuration files
    "no such configuration": Case(options("--config", "/no/such.yaml"), ("config", "'/no/such.yaml'")),
    "a folder as configuration": Case(lambda p: ["--config", str(p.folder)], ("config: Path is not a file",)),
    "an empty configuration": Case(config("c.yaml", ""), ("a file must hold keys with values", "found nothing")),
    "a list as configuration": Case(config("c.yaml", "- a\n- b\n"), ("must hold keys with values", "found - a - b")),
    "a bracket left open": Case(
        config("c.yaml", "model: {loss: [\n"), ("c.yaml: not valid YAML in UTF-8", "line 2, column 1")
    ),
    "a program as configuration": Case(
        config("c.yaml", b"\x7fELF\x02\xff\xfe"), ("c.yaml: not valid YAML in UTF-8", "byte 0xff")
    ),
    # values that a class refuses while it is made
    "a rank of zero": Case(options("--model.lora.r", "0"), ("lora.r=0 is not allowed; allowed: an integer >= 1",)),
    "no such layers": Case(options("--model.lora.target_modules", "qkv"), ("'qkv' does not fit", "down_proj")),
    "a negative rate": Case(options("--model.optimizer.lr", "-1"), ("model.optimizer: Invalid learning rate: -1.0",)),
    "no such optimizer": Case(options("--model.optimizer", "torch.optim.Adam1"), ("model.optimizer", "Adam1")),
    "no such strategy": Case(options("--trainer.strategy", "magic"), ("strategy='magic'", "ddp")),
    "no micro-batches": Case(
        options("--trainer.accumulate_grad_batches", "0"), ("trainer.accumulate_grad_batches=0", "an integer >= 1")
    ),
    "a folder that is a file": Case(
        lambda p: ["--run.root", p.file("taken", "")], ("run.root=", "no folder can be made there", "taken")
    ),
    # options that would do nothing
    "a judge of no samples": Case(
        options("--report.enabled", "true", "--report.num_prompts", "0", "--report.gold", "VaderSentiment"),
        ("report.gold='VaderSentiment'", "report.num_prompts above 0"),
    ),
    "settings of no samples": Case(
        options("--report.enabled", "true", "--report.num_prompts", "0", "--report.sampling.seed", "3"),
        ("report.sampling=", "report.num_prompts above 0"),
    ),
    "a seed of no noise": Case(options("--data.label_noise_seed", "3"), ("data.label_noise=0.0 flips no label",)),
    "a learning rate of text": Case(
        options("--model.optimizer.lr", "small"), ("error: AdamW.lr: Expected a float. Got value: small",)
    ),
    "a misspelt judge": Case(
        options("--report.gold", "Vader"), ("report.gold: unknown name 'Vader'; allowed: VaderSentiment",)
    ),
    "an option without its group": Case(
        options("--batch_size", "4"), ("batch_size: did you mean data.batch_size or report.",)
    ),
    # models
    "an empty folder as model": Case(
        lambda p: ["--model.policy.path", str((p.folder / "m").mkdir() or p.folder / "m")],
        ("no tokenizer could be loaded from", "allowed: a hub name or folder"),
    ),
    "a model without its tokenizer": Case(
        model(lambda folder: [file.unlink() for file in folder.glob("tokenizer*")]), ("no tokenizer could be loaded",)
    ),
    "half a tokenizer": Case(model(half("tokenizer.json")), ("no tokenizer could be loaded from", "model'")),
    "half a config": Case(model(lambda f: (f / "config.json").write_text("{")), ("not a valid JSON file",)),
    "half the weights": Case(model(half("model.safetensors")), ("no model could be loaded from", "header")),
    "no weights": Case(model(lambda f: (f / "model.safetensors").unlink()), ("no file named model.safetensors",)),
    "weights of other shapes": Case(model(edited("config.json", hidden_size=64)), ("no model could be loaded from",)),
    "weights that are not numbers": Case(model(not_a_number), ("llama, as loaded, cannot be scored here",)),
    "an unknown architecture": Case(model(edited("config.json", model_type="martian")), ("model type `martian`",)),
    "an encoder and decoder": Case(model(edited("config.json", model_type="t5")), ("T5Config", "AutoModelForCausalLM")),
    "an adapter as model": Case(
        model(lambda f: (f / "adapter_config.json").write_text("{}")), ("is an adapter, not a model",)
    ),
    "half a GGUF file": Case(lambda p: ["--model.policy.path", p.file("m.gguf", b"GGUF\x03")], ("m.gguf",)),
    "a package without a model": Case(
        options("--model.policy.path", "package:json"), ("expected exactly one .gguf file in the package 'json'",)
    ),
    "no such adapter": Case(options("--model.policy.adapter", "/no/such"), ("adapter '/no/such': no such folder",)),
    # tokenizers
    "tokens beyond the embedding": Case(
        model(with_words), ("train.jsonl, row 1 (line 1): token 'good", "the model reads ids below 320", ANOTHER)
    ),
    "padding beyond the embedding": Case(
        model(with_padding), ("padding token '<|padding|>' has the id 320", "ids below 320", ANOTHER)
    ),
    # checkpoints
    "a checkpoint of text": Case(checkpoint(b"hello"), ("some.ckpt: not a checkpoint, or one that was cut short",)),
    "an empty checkpoint": Case(checkpoint(b""), ("some.ckpt: not a checkpoint, or one that was cut short",)),
    "half a checkpoint": Case(
        checkpoint(lambda p: p.checkpoint.read_bytes()[:9000]), ("not a checkpoint, or one that was cut short",)
    ),
    "a checkpoint with a program": Case(checkpoint(saved({"x": Runs()})), ("loading these can run code",)),
    "a pickle as checkpoint": Case(checkpoint(pickle.dumps({"x": Runs()})), ("some.ckpt: not a checkpoint",)),
    "a tensor as checkpoint": Case(
        checkpoint(saved(torch.zeros(3))), ("some.ckpt: not a checkpoint of this program (no hyper_parameters",)
    ),
    "a checkpoint of another program": Case(
        checkpoint(saved({"state_dict": {}, "epoch": 3})), ("not a checkpoint of this program (no hyper_parameters",)
    ),
    "a folder as checkpoint": Case(lambda p: ["--ckpt_path", p.model], ("is a folder, but no sharded checkpoint",)),
    "a checkpoint of an older version": Case(
        checkpoint(saved({"state_dict": {}, "hyper_parameters": {}, "loops": {}})), ("it does not say its format",)
    ),
    # places
    "a cache that is a file": Case(
        lambda p: ["--data.cache_dir", p.file("cache", "")], ("data.cache_dir: the tokenised pairs cannot be written",)
    ),
    "a learning rate that explodes": Case(
        options("--model.optimizer.lr", "1e30", "--trainer.max_steps", "4"), ("optimizer step 2 was not taken",), 1
    ),
}


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_what_every_run_needs_is_asked_for_by_its_own_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main([command, "--model.loss", "DPO"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --model.policy.path, --model.margin: required, on the command line or in a file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_by_its_option(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *finished.arguments, "--trainer.accelerator", "gpu"]) == 2
    assert "error: trainer.accelerator='gpu': torch " in (told := capsys.readouterr().err) and "sees no GPU" in told


class Finished(NamedTuple):
    """A run that came to its end, and its caches."""

    arguments: list[str]
    model: str
    root: Path

    def digests(self) -> dict[Path, str]:
        """What its files hold."""
        kept = [f for f in self.root.rglob("*") if f.suffix in (".ckpt", ".arrow", ".safetensors", ".yaml", ".csv")]
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One good run that all cases share."""
    root = tmp_path_factory.mktemp("finished")
    path = str(save_tiny_model(root / "model"))
    data = {split: str(write_rows(root / f"{split}.jsonl", tiny_rows(8))) for split in ("train", "validation", "test")}
    given = arguments(path, data, root, ["--trainer.max_steps", "2", "--export.enabled", "false"])
    given += ["--data.cache_dir", str(root / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gamma_po"])
        assert main(["fit", *given]) == 0
    return Finished(given, path, root)


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_around_a_run_is_told_in_one_message_and_costs_nothing(
    name: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (last,) = finished.root.rglob("last.ckpt")
    case, before = CASES[name], finished.digests()
    given = case.given(Place(tmp_path, finished.model, last))
    capsys.readouterr()
    try:
        status = main(["fit", *finished.arguments, *given])
    except SystemExit as stop:  # the parser's own errors
        status = stop.code
    told = capsys.readouterr().err
    message = told[max(told.find("error: "), told.find("stopped: ")) :]
    assert status == case.status and message.startswith(("error: ", "stopped: ")) and "Traceback" not in told
    for part in case.says:
        assert part in message, message
    after = finished.digests()
    assert {file: after.get(file) for file in before} == before
    assert not [file for file in after.keys() - before.keys() if file.suffix == ".ckpt"]
    assert not (tmp_path / "this-was-run").exists() and not (tmp_path / "plots").exists()


def test_the_tables_cover_every_place_where_people_go_wrong() -> None:
    tables = [others.ROWS, others.FILES, others.TOKENIZERS, others.SOURCES, others.CONFIGURATIONS, CASES]
    assert all(tables) and sum(map(len, tables)) >= 110


@pytest.fixture
def little_room() -> Any:
    """Makes the operating system refuse to write beyond a number of bytes per file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("drawn_figures")
def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before_whole(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    little_room: Callable[[int], None],
) -> None:
    save = save_whole

    def save_in_little_room(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 4:
            little_room(4096)
        save(trainer, *args, **kwargs)

    monkeypatch.setattr("gamma_po.callbacks.checkpoint.save_whole", save_in_little_room)
    given = [*finished.arguments, "--run.root", str(tmp_path), "--trainer.max_steps", "4", "--trainer.max_epochs", "-1"]
    assert main(["fit", *given, "--checkpoint.every_n_train_steps", "2"]) == 1
    little_room(resource.RLIM_INFINITY)
    told = capsys.readouterr().err
    assert "stopped: " in told and "the disk takes no more" in told and "Traceback" not in told
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2 and not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr("gamma_po.callbacks.checkpoint.save_whole", save)
    assert main(["fit", *given, "--ckpt_path", str(last)]) == 0


def test_a_disk_that_is_full_before_anything_is_cached_is_told_with_the_folder(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    little_room: Callable[[int], None],
) -> None:
    little_room(4096)
    given = [*finished.arguments, "--data.cache_dir", str(tmp_path / "cache"), "--trainer.logger", "false"]
    status = main(["fit", *given, "--run.root", str(tmp_path)])
    little_room(resource.RLIM_INFINITY)
    told = capsys.readouterr().err
    assert status == 2 and f"the tokenised pairs cannot be written to {tmp_path / 'cache'}" in told
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*.partial"))


def test_an_inspection_whose_words_go_to_a_full_disk_ends_in_one_message(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # as `inspect ... > FILE`; closing fails again
        monkeypatch.setattr("sys.stdout", full)
        status = main(["inspect", *finished.arguments])
    assert status == 1
    told = capsys.readouterr().err
    assert "stopped: " in told and "the disk takes no more" in told and "Traceback" not in told


INTERRUPTED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "half a file of tokens": ("*.arrow", lambda file: file.write_bytes(file.read_bytes()[:-40]), "are made anew"),
    "an empty file of tokens": ("*.arrow", lambda file: file.write_bytes(b""), "are made anew"),
    "half a shard of the reference": (
        "*.safetensors",
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        "is damaged",
    ),
    "an empty shard of the reference": ("*.safetensors", lambda file: file.write_bytes(b""), "is damaged"),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_cache_that_was_interrupted_is_told_and_made_anew_with_the_same_numbers(
    name: str, finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pattern, spoil, says = INTERRUPTED[name]
    shutil.copytree(finished.root / "cache", tmp_path / "cache")
    spoilt = [file for file in (tmp_path / "cache").rglob(pattern) if spoil(file) is not None]
    given = [*finished.arguments, "--data.cache_dir", str(tmp_path / "cache"), "--run.root", str(tmp_path / "runs")]
    with caplog.at_level(logging.WARNING):
        assert main(["fit", *given]) == 0
    assert spoilt and says in caplog.text
    first, again = (min(root.rglob("metrics.csv")).parent for root in (finished.root / "runs", tmp_path / "runs"))
    for column in ("train/loss", "train/rewards/margins", "val/loss"):
        assert steps_of(first, column) == steps_of(again, column) != []


def test_two_runs_that_start_at_once_read_the_data_once_and_get_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    source = str(write_rows(tmp_path / "pairs.jsonl", tiny_rows(30)))
    reading = Reading(Columns(), Tokenization(), "error", None)
    built: list[Path] = []
    build = pair_files._build
    monkeypatch.setattr(pair_files, "_build", lambda path, *rest: (built.append(path), build(path, *rest)))
    found: list[Any] = []
    gate = threading.Barrier(2)

    def start() -> None:
        gate.wait()
        found.append(pair_file(source, tiny_tokenizer(), reading, tmp_path / "cache", show_progress=False))

    runs = [threading.Thread(target=start) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert len(built) == 1 and found[0].table.equals(found[1].table) and len(found[0]) == 30

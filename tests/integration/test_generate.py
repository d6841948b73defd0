"""`generate` answers prompts in the benchmarks' formats, goes on where it was stopped, and chats."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM

from gamma_po.__main__ import main
from gamma_po.evaluation import answering, generation
from gamma_po.evaluation import chat as conversations
from gamma_po.evaluation.answer_formats import Answer, read_questions, short_id, style
from tests.tiny import WORDS, tiny_model, tiny_tokenizer, write_rows

QUICK = ["--sampling.max_new_tokens", "6", "--sampling.batch_size", "2"]


def questions(number: int) -> list[dict[str, object]]:
    """AlpacaEval questions of different lengths."""
    texts = [" ".join(WORDS[: 2 + i % 5]) + f" {i}" for i in range(number)]
    return [{"instruction": text, "dataset": "helpful_base", "datasplit": "eval"} for text in texts]


def generate(model: str, prompts: Path, output: Path, *options: str) -> int:
    """Run the command."""
    return main(["generate", "--policy", model, "--prompts", str(prompts), "--output", str(output), *QUICK, *options])


def test_alpaca_eval_answers_have_exactly_its_fields(tiny_model_path: str, tmp_path: Path) -> None:
    prompts, output = write_rows(tmp_path / "q.jsonl", questions(5)), tmp_path / "answers.json"
    assert generate(tiny_model_path, prompts, output, "--generator", "mine") == 0
    answers = json.loads(output.read_text())
    assert [answer["instruction"] for answer in answers] == [question["instruction"] for question in questions(5)]
    for answer in answers:
        assert set(answer) == {"instruction", "output", "generator", "dataset", "datasplit"}
        assert (answer["generator"], answer["dataset"], answer["datasplit"]) == ("mine", "helpful_base", "eval")
    settings = json.loads((tmp_path / "answers.json.settings.json").read_text())
    assert settings["sampling"]["temperature"] == 0.7 and settings["prompts"]["number"] == 5
    assert (settings["dtype"], settings["attention"]) == ("float32", "sdpa")
    assert not list(tmp_path.glob("*.partial*"))


def test_arena_hard_answers_have_exactly_its_fields(tiny_model_path: str, tmp_path: Path) -> None:
    rows = [{"question_id": f"q{i}", "category": "x", "turns": [{"content": f"the cat {i}"}]} for i in range(3)]
    prompts, output = write_rows(tmp_path / "q.jsonl", rows), tmp_path / "mine.jsonl"
    assert generate(tiny_model_path, prompts, output, "--format", "arena_hard", "--generator", "mine") == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == ["q0", "q1", "q2"]
    for answer in answers:
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"}
        assert answer["model_id"] == "mine" and len(answer["answer_id"]) == 22
        (choice,) = answer["choices"]
        (turn,) = choice["turns"]
        assert choice["index"] == 0 and set(turn) == {"content", "token_len"}
        assert set(answer["conv_metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}


def test_arena_hard_2_answers_have_exactly_its_fields(tiny_model_path: str, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "q.jsonl", [{"uid": "u1", "category": "hard_prompt", "prompt": "the dog"}])
    output = tmp_path / "mine.jsonl"
    assert generate(tiny_model_path, prompts, output, "--format", "arena_hard_v2", "--generator", "mine") == 0
    answer = json.loads(output.read_text())
    assert set(answer) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert answer["messages"][0] == {"role": "user", "content": "the dog"}
    assert list(answer["messages"][1]["content"]) == ["answer"]


def test_greedy_answers_are_what_transformers_decodes_one_by_one(tiny_model_path: str, tmp_path: Path) -> None:
    prompts, output = write_rows(tmp_path / "q.jsonl", questions(5)), tmp_path / "answers.json"
    assert generate(tiny_model_path, prompts, output, "--sampling.temperature", "0") == 0
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for answer in json.loads(output.read_text()):
        message = [{"role": "user", "content": answer["instruction"]}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        new = []
        with torch.no_grad():
            while len(new) < 6 and (not new or new[-1] != tokenizer.eos_token_id):
                row = torch.cat([ids, torch.tensor([new], dtype=torch.long)], dim=1)
                new.append(int(model(row).logits[0, -1].argmax()))
        assert answer["output"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_answers(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_rows(tmp_path / "q.jsonl", questions(7))
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    assert generate(tiny_model_path, prompts, whole, "--generator", "mine") == 0
    sampled = answering.sampled_batches

    def stopped(*args: object, **kwargs: object) -> object:
        for number, batch in enumerate(sampled(*args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(answering, "sampled_batches", stopped)
    assert generate(tiny_model_path, prompts, resumed, "--generator", "mine") == 130
    partial = tmp_path / "resumed.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 3 and not resumed.exists()
    partial.write_text(partial.read_text() + '{"i": 0, "te')  # a line that a crash has cut
    drawn = []

    def counted(*args: object, **kwargs: object) -> object:
        for batch in sampled(*args, **kwargs):
            drawn.extend(batch[0])
            yield batch

    monkeypatch.setattr(answering, "sampled_batches", counted)
    assert generate(tiny_model_path, prompts, resumed, "--generator", "mine") == 0
    assert len(drawn) == 4
    assert resumed.read_text() == whole.read_text()


def test_the_longest_prompts_come_first_and_what_is_drawn_does_not_depend_on_it(
    tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = tiny_model(), generation.Sampling(max_new_tokens=5, batch_size=2)
    prompts = [torch.arange(3, 3 + length) for length in (2, 9, 4, 7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of which none is touched, and torch says nothing
    before, batches = torch.get_rng_state(), list(generation.sampled_batches(model, prompts, sampling))
    assert [batch for batch, _ in batches] == [[1], [4, 3], [0, 2]]
    assert torch.get_rng_state().equal(before)
    for wanted, rows in batches:
        ((batch, again),) = generation.sampled_batches(model, prompts, sampling, done=set(range(5)) - set(wanted))
        assert batch == wanted and all(a.equal(b) for a, b in zip(rows, again, strict=True))


def test_a_stopped_run_with_other_settings_is_refused(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = write_rows(tmp_path / "q.jsonl", questions(3)), tmp_path / "a.json"

    def stopped(*args: object, **kwargs: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering, "sampled_batches", stopped)
        generate(tiny_model_path, prompts, output)
    assert generate(tiny_model_path, prompts, output, "--sampling.seed", "1") == 2
    message = capsys.readouterr().err
    assert "with other settings: sampling was" in message and "delete it to start anew" in message


TURN, OWN = "<|im_start|>user\n", ["--format", "prompts"]
SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], [], "row 1 (line 1): column 'instruction' must hold text"),
        ([{"instruction": " "}], [], "column 'instruction' must hold text"),
        ([{"question_id": "1", "turns": []}], ["--format", "arena_hard"], "a list of one turn with content"),
        ([{"instruction": "word " * 600}], [], "row 1 (line 1): the prompt is too long: "),
        ([{"instruction": "\ud83d"}], [], "row 1 (line 1): not valid Unicode (an unpaired surrogate)"),
        (
            [{"instruction": f"{TURN}a<|im_end|>"}],
            [],
            "would be applied twice; allowed: texts without it, or --template",
        ),
        ([{"chosen": "a", "rejected": "b"}], OWN, "no column 'prompt', which prompts must have, also those of pairs; "),
        ([{"prompt": [USER, {"role": "assistant", "content": "b"}]}], OWN, "there is nothing to answer"),
        ([{"prompt": "a", "tools": [{"name": "f"}]}], OWN, "allowed: a template that writes them, or prompts without"),
        (
            [{"prompt": [SYSTEM, USER], "system": "be long"}],
            OWN,
            "are two system messages; read as --format prompts, others: alpaca_eval, ",
        ),
        ([{"prompt": "[{'role': 'user', 'content': 'a'}]"}], OWN, "in a .jsonl or .parquet file; read as"),
        ([{"instruction": "a"}], ["--sampling.temperature", "-1"], "sampling.temperature=-1.0 is not allowed"),
        ([{"instruction": "a"}], ["--sampling.seed", str(2**64)], "allowed: an integer, 0 <= seed < 2**32"),
        ([{"instruction": "a"}], ["--sampling.max_new_tokens", "9999"], "leaves no room for a prompt"),
        ([{"instruction": "a"}], ["--format", "alpaca"], "alpaca_eval"),
        ([{"instruction": "a"}], ["--policy.path", "/no/such/model"], "no such folder"),
        (
            [{"instruction": "a"}],
            ["--policy.path", "runs/mien"],
            "nor is there a folder 'runs/mien'; allowed: a run dir",
        ),
        ([{"instruction": "a"}], ["--device", "no_such"], "device='no_such' cannot be used"),
        ([{"instruction": "a"}], ["--samling.seed", "1"], "did you mean sampling?"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_message(
    rows: list[dict[str, object]],
    options: list[str],
    message: str,
    tiny_model_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "a.json", *options)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
    assert "data." not in error and "columns." not in error  # options of `fit`, which this command has not
    assert not list(tmp_path.glob("a.json*"))


def test_an_answer_file_is_never_replaced(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.json"
    output.write_text("someone's")
    assert generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", questions(1)), output) == 2
    assert "nothing is replaced" in capsys.readouterr().err and output.read_text() == "someone's"


def test_where_nothing_can_be_written_is_said_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_rows(tmp_path / "q.jsonl", questions(1))
    assert generate("/no/such/model", prompts, prompts / "a.json") == 2
    assert f"nothing can be written there: {prompts} is no folder" in capsys.readouterr().err


def test_a_second_process_with_the_same_output_is_refused_and_takes_nothing_away(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = write_rows(tmp_path / "q.jsonl", questions(2)), tmp_path / "a.json"
    with FileLock(tmp_path / "a.json.partial.jsonl.lock"):
        assert generate(tiny_model_path, prompts, output) == 2
    assert "another process is writing these answers" in capsys.readouterr().err and not output.exists()
    assert generate(tiny_model_path, prompts, output) == 0
    assert sorted(file.name for file in tmp_path.glob("a.json*")) == ["a.json", "a.json.settings.json"]


def test_answers_are_counted_as_cut_by_their_tokens_and_not_by_their_text(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    space, word, end = tokenizer.encode(" "), tokenizer.encode("z"), [tokenizer.eos_token_id]
    drawn = [word * 6, word + space * 5, word * 5 + end]  # cut; cut, though its text is shorter; ended by itself
    rows = [torch.tensor(ids) for ids in drawn]
    monkeypatch.setattr(answering, "sampled_batches", lambda *args, **kwargs: iter([([0, 1, 2], rows)]))
    assert generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", questions(3)), tmp_path / "a.json") == 0
    assert "2 of them cut at sampling.max_new_tokens" in capsys.readouterr().out
    assert [answer["output"] for answer in json.loads((tmp_path / "a.json").read_text())] == ["zzzzzz", "z", "zzzzz"]


def test_ones_own_prompts_are_read_as_fit_reads_them(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "c1"}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "2"}]
    rows = [
        {"prompt": "a", "system": "be brief", "chosen": "b", "rejected": "c"},
        {"prompt": turns, "tools": '[{"name": "f"}]'},
        {"prompt": "\n\nHuman: a\n\nAssistant:"},
    ]
    found = [question.prompt for question in read_questions(str(write_rows(tmp_path / "q.jsonl", rows)), "prompts")]
    read = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert found[0] == (SYSTEM, USER) and found[2] == (USER,)
    asked, called, told = found[1]
    assert asked == {**USER, "tools": tools} and called["tool_calls"] == [read] and told["name"] == "f"


def test_a_gpu_that_is_full_is_told_in_one_message(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    assert generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", questions(1)), tmp_path / "a.json") == 1
    assert "stopped: CUDA out of memory. Tried to allocate 2 GiB. A smaller batch" in capsys.readouterr().err


def talk(model: str, monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = ()) -> int:
    """Chat, these lines being typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["generate", "--policy", model, "--interactive", "--sampling.max_new_tokens", "4", *options])


def test_a_chat_without_room_for_a_message_is_refused_at_once(
    tiny_model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(tiny_model_path, monkeypatch, "hi", options=("--sampling.max_new_tokens", "512")) == 2
    told = capsys.readouterr()
    assert "leaves no room for a prompt: the model has 512 positions; allowed: less than 512" in told.err
    assert "you>" not in told.out


@pytest.mark.parametrize(
    ("message", "says"),
    [("word " * 600, "this message is too long: "), ("<|im_start|>user a<|im_end|>", "applied twice")],
)
def test_a_message_that_cannot_be_read_is_told_and_the_chat_goes_on_as_before_it(
    message: str, says: str, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = ("--sampling.temperature", "0")
    assert talk(tiny_model_path, monkeypatch, "the cat", "very good", options=greedy) == 0
    *_, expected = capsys.readouterr().out.split("policy> ")
    assert talk(tiny_model_path, monkeypatch, "the cat", message, "very good", options=greedy) == 0
    *_, refused, found = capsys.readouterr().out.split("policy> ")
    assert says in " ".join(refused.split()) and "data." not in refused and found == expected


def test_the_progress_bar_is_there_before_the_first_batch_is_done(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_batch(*_: object) -> None:
        assert "answering:   0%" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "_generate", first_batch)
    assert generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", questions(1)), tmp_path / "a.json") == 130


def test_a_chat_shows_no_progress_bar_and_what_is_written_as_it_is(
    tiny_model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = []
    monkeypatch.setattr(
        generation, "track", lambda items, what, visible=True, delay=2: bars.append(visible) or iter(items)
    )
    assert talk(tiny_model_path, monkeypatch, "hi") == 0 and bars == [False]
    monkeypatch.setattr(conversations.Conversation, "answer", lambda self, text, show: show(":smile: [b]x[/b]"))
    assert talk(tiny_model_path, monkeypatch, "hi") == 0
    assert "policy> :smile: [b]x[/b]\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "says"), [(b"h\xe4t\n", "error: the input is not valid utf-8"), ("h\udce4t\n", "is not valid Unicode")]
)
def test_a_chat_of_another_encoding_ends_in_a_message(
    typed: bytes | str,
    says: str,
    tiny_model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdin = io.StringIO(typed) if isinstance(typed, str) else io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate", "--policy", tiny_model_path, "--interactive", "--sampling.max_new_tokens", "4"]) in (0, 2)
    told = capsys.readouterr()
    assert says in told.out + told.err


@pytest.mark.parametrize(
    "option", [("--format", "prompts"), ("--limit", "3"), ("--output", "a.json"), ("--sampling.batch_size", "8")]
)
def test_options_that_a_chat_does_not_read_are_refused(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--policy", "/no/such", "--interactive", *option]) == 2
    assert f"--interactive does not use {option[0]}" in capsys.readouterr().err


def test_the_chat_keeps_the_conversation_until_it_is_reset(
    tiny_model_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        greedy = ["--sampling.max_new_tokens", "4", "--sampling.temperature", "0"]
        assert main(["generate", "--policy", tiny_model_path, "--interactive", *greedy]) == 0
        answers = capsys.readouterr().out.split("policy> ")[1:]
        return [answer.split("you> ")[0].strip() for answer in answers]

    first, second = chat("the cat", "very good")
    (alone,) = chat("very good")
    assert chat("the cat", "/reset", "very good") == [first, alone]
    assert second != alone  # the first exchange was read


@pytest.fixture
def text_run(tiny_model_path: str, tmp_path: Path) -> Path:
    """A run that read prompts as text, by its records, with an exported policy that has a chat template."""
    run = tmp_path / "run"
    shutil.copytree(tiny_model_path, run / "policy")
    (run / "config.yaml").write_text("data: {tokenization: {template: text, max_prompt_length: 7}}\n")
    (run / "run.json").write_text("{}")
    return run


def digest_of(*texts: str) -> str:
    found = hashlib.sha256()
    for ids in map(tiny_tokenizer().encode, texts):
        found.update(len(ids).to_bytes(4, "little") + b"".join(token.to_bytes(4, "little") for token in ids))
    return found.hexdigest()


def test_prompts_become_text_as_in_the_policys_run_unless_said_otherwise(text_run: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "q.jsonl", [{"instruction": "the cat"}])
    rendered = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    cases = [(str(text_run), [], "text", "the cat"), (str(text_run), ["--template", "chat"], "chat", rendered)]
    cases += [(str(tiny_copy(text_run, tmp_path)), [], "auto", rendered)]
    for number, (policy, options, template, text) in enumerate(cases):
        assert generate(policy, prompts, tmp_path / f"{number}.json", *options) == 0
        settings = json.loads((tmp_path / f"{number}.json.settings.json").read_text())
        assert settings["template"] == template and settings["prompts"]["sha256"] == digest_of(text)


def tiny_copy(run: Path, folder: Path) -> Path:
    """The policy of a run, outside of it."""
    return Path(shutil.copytree(run / "policy", folder / "apart" / "inner" / "policy"))


def test_a_chat_with_a_policy_of_a_text_run_shows_it_each_message_as_it_is(
    text_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    sampled = conversations.sampled_batches

    def recorded(model: object, prompts: list[torch.Tensor], *args: object, **kwargs: object) -> object:
        shown.append(prompts[0].tolist())
        return sampled(model, prompts, *args, **kwargs)

    monkeypatch.setattr(conversations, "sampled_batches", recorded)
    for options in ([], ["--template", "chat"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nvery good\n"))
        assert main(["generate", "--policy", str(text_run), "--interactive", *QUICK[:2], *options]) == 0
    tokenizer = tiny_tokenizer()
    assert shown[:2] == [tokenizer.encode("the cat"), tokenizer.encode("very good")]
    assert tokenizer.decode(shown[3]).startswith("<|im_start|>user") and len(shown[3]) > len(shown[2])


def test_the_style_record_counts_markdown_outside_of_code() -> None:
    text = "# One\n## Two\n1. a\n2. b\n- c\n* d\n**bold** and __bold__\n```\n# not\n- not\n```\n"
    found = style(Answer(text, 7, 0.0))
    assert found["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert found["list_count"] == {"ordered": 2, "unordered": 2}
    assert found["bold_count"] == {"**": 1, "__": 1} and found["token_len"] == 7


def test_answer_ids_depend_on_model_question_and_answer() -> None:
    ids = {short_id("m", "q", "a"), short_id("n", "q", "a"), short_id("m", "r", "a"), short_id("m", "q", "b")}
    assert len(ids) == 4 and short_id("m", "q", "a") in ids and all(len(i) == 22 for i in ids)

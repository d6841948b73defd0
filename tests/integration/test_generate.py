"""`generate` answers prompts in the benchmarks' formats, goes on where it was stopped, and chats."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from gamma_po.__main__ import main
from gamma_po.evaluation import answering
from gamma_po.evaluation import chat as conversations
from gamma_po.evaluation.answer_formats import Answer, short_id, style
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
    assert len(partial.read_text().splitlines()) == 1 + 4 and not resumed.exists()
    partial.write_text(partial.read_text() + '{"i": 6, "te')  # a line that a crash has cut
    drawn = []

    def counted(*args: object, **kwargs: object) -> object:
        for batch in sampled(*args, **kwargs):
            drawn.extend(batch[0])
            yield batch

    monkeypatch.setattr(answering, "sampled_batches", counted)
    assert generate(tiny_model_path, prompts, resumed, "--generator", "mine") == 0
    assert len(drawn) == 3
    assert resumed.read_text() == whole.read_text()


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


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], [], "row 1 (line 1): column 'instruction' must hold text"),
        ([{"instruction": " "}], [], "column 'instruction' must hold text"),
        ([{"question_id": "1", "turns": []}], ["--format", "arena_hard"], "a list of one turn with content"),
        ([{"instruction": "word " * 600}], [], "row 1 (line 1): prompt: too long"),
        ([{"instruction": "a"}], ["--sampling.max_new_tokens", "9999"], "leaves no room for a prompt"),
        ([{"instruction": "a"}], ["--format", "alpaca"], "alpaca_eval"),
        ([{"instruction": "a"}], ["--policy.path", "/no/such/model"], "no such folder"),
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
    assert not (tmp_path / "a.json").exists()


def test_an_answer_file_is_never_replaced(
    tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.json"
    output.write_text("someone's")
    assert generate(tiny_model_path, write_rows(tmp_path / "q.jsonl", questions(1)), output) == 2
    assert "nothing is replaced" in capsys.readouterr().err and output.read_text() == "someone's"


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
        assert main(["generate", "--policy", str(text_run), "--interactive", *QUICK, *options]) == 0
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

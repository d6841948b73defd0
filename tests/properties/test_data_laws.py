"""Laws of the data path: whatever is in a row, it is read back whole, refused in one line, or counted."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from gamma_po.data.columns import Columns
from gamma_po.data.encoding import Encoder
from gamma_po.data.formatting import Preference, problem, read_preferences, to_preference
from gamma_po.data.messages import ROLES, is_transcript
from gamma_po.data.sources import Row
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.errors import DataError
from tests.tiny import tiny_tokenizer
from tests.unit.test_tokenization import THINKING, byte_bpe, sentencepiece_like

WHERE = "pairs.jsonl, row 3 (line 4)"
FUZZ = settings(max_examples=60, deadline=None)
HUGE = "好🙂a \n" * 2_000
CHOSEN_TEXTS = ["", " ", "\n\nHuman: a\n\nAssistant: b", "</s>", "<|im_start|>", "{{ x }}", "../../etc/passwd"]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
text = st.text(max_size=30) | st.sampled_from(CHOSEN_TEXTS)
message = st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "human"]), "content": text})
turns = st.lists(message, max_size=4)
names = st.sampled_from(
    ["prompt", "chosen", "rejected", "system", "question", "instruction", "input", "history", "output", "messages",
     "conversations", "generations", "ratings", "scores", "tools", "gap"]
)  # fmt: skip
rows = st.dictionaries(names, anything | text | turns, max_size=7)
good_rows = st.fixed_dictionaries({"prompt": text | turns, "chosen": text, "rejected": text})


@FUZZ
@given(rows | good_rows, st.sampled_from(["auto", "plain"]), st.sampled_from([None, "gap"]))
@example({"chosen": "Human:\n\nAssistant:", "rejected": "Human:\n\nAssistant:"}, "auto", None)
@example({"prompt": "\n\nHuman:\n\nAssistant:", "chosen": "", "rejected": ""}, "auto", None)
@example({"prompt": "Human:x\n\nAssistant:\n\nAssistant:", "chosen": "a", "rejected": "b"}, "auto", None)
def test_any_row_is_a_preference_of_text_or_an_error_of_one_line_that_names_the_row(
    values: dict[str, Any], format: Any, margin: str | None
) -> None:
    try:
        found = to_preference(Row(values, WHERE), Columns(format=format, margin=margin))
    except DataError as error:
        assert str(error).startswith(WHERE) and "\n" not in str(error).replace(repr(values), "")
        return
    assert isinstance(found.chosen, str) and isinstance(found.rejected, str) and found.location == WHERE
    assert isinstance(found.prompt, str) or all(turn["role"] in ROLES for turn in found.prompt)
    assert margin is None or math.isfinite(found.column)
    problem(found)


@FUZZ
@given(text, text, text)
def test_plain_texts_are_read_to_the_letter(prompt: str, chosen: str, rejected: str) -> None:
    values = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert to_preference(Row(values, WHERE), Columns(format="plain"))[:3] == (prompt, chosen, rejected)
    if not any(map(is_transcript, (prompt, chosen, rejected))):
        assert to_preference(Row(values, WHERE), Columns())[:3] == (prompt, chosen, rejected)


def calling(arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"prompt": [*asked, {"role": "tool", "content": "4"}], "chosen": "a", "rejected": "b"}


def calling_with(tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools}


inner = st.fixed_dictionaries({}, optional={"x": st.integers(-9, 9), "y": st.text(max_size=3)})
given_tools = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("fg")}, optional={"description": st.text(max_size=3), "in": inner}),
    min_size=1,
    max_size=2,
)
given_arguments = st.fixed_dictionaries(
    {}, optional={"city": st.text(max_size=3), "place": inner, "places": st.lists(inner, max_size=2)}
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(good_rows, min_size=1, max_size=5)
    | st.lists(given_arguments.map(calling), min_size=1, max_size=5)
    | st.lists(given_tools.map(calling_with), min_size=1, max_size=5)
)
@example([calling({"city": "Paris"}), calling({"x": 1}), calling({"city": "", "places": [{"x": 1}, {"y": "z"}]})])
def test_jsonl_and_parquet_give_the_same_pairs_and_counts(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    """Parquet cannot hold a column of two types: rows with conversations are compared among themselves."""
    kind = type(values[0]["prompt"])
    same = [row for row in values if type(row["prompt"]) is kind]
    try:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(same), buffer)
    except (UnicodeEncodeError, pa.ArrowNotImplementedError):
        return  # half a character, and objects that are empty in every row
    folder, results = tmp_path_factory.mktemp("rows"), []
    for name, content in {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in same).encode(),
        "a.parquet": buffer.getvalue(),
    }.items():
        (folder / name).write_bytes(content)
        try:
            pairs, counts = read_preferences(str(folder / name), Columns(), invalid_rows="drop")
            results.append(([pair[:3] for pair in pairs], counts))
        except DataError as error:
            results.append(str(error).split(": ", 1)[1])
    assert results[0] == results[1]


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "plain": byte_bpe(),
    "merges": byte_bpe(("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ"), ("0", "0")),
    "bos, eos": byte_bpe(bos=True, eos=True),
    "pad is eos": byte_bpe(pad_token="</s>"),
    "chat": tiny_tokenizer(),
    "thinking": byte_bpe(bos=True, template=THINKING),
}
SPECIAL = ("<pad>", "<s>", "</s>", "<end>", "<|pad|>", "<|im_start|>", "<|im_end|>", "think")


def is_tame(*texts: str) -> bool:
    """Whether no text holds a token that means something to a tokenizer or template."""
    return not any(special in text for special in SPECIAL for text in texts)


@pytest.mark.parametrize("name", TOKENIZERS)
@FUZZ
@given(text, text, text, st.integers(1, 40))
@example("q", "a" + HUGE, HUGE, 40)
@example("q", "a" * 30, "b" * 41, 30)
@example("xa", "bb", "b", 9)
def test_the_decoded_completion_is_the_source_up_to_counted_truncation(
    name: str, prompt: str, chosen: str, rejected: str, most: int
) -> None:
    tokenizer = TOKENIZERS[name]
    pair = Preference(prompt, chosen, rejected, None, WHERE)
    if problem(pair) is not None or not is_tame(prompt, chosen, rejected):
        return
    options = Tokenization(max_prompt_length=10**6, max_completion_length=most)
    try:
        (found,), _, counts = tokenize_preferences([pair], tokenizer, options, show_progress=False)
    except DataError as error:
        assert "dropped_identical 1" in str(error)
        return
    for side, source in (("chosen", chosen), ("rejected", rejected)):
        ids = getattr(found, side).tolist()
        expected = source.lstrip("\n") if name == "thinking" else source  # that template strips line breaks
        cut = counts[f"{side}_truncated"]
        assert (ids[-1] == tokenizer.eos_token_id) is (not cut) and ids.count(tokenizer.eos_token_id) == 1 - cut
        decoded = tokenizer.decode(ids if cut else ids[:-1], clean_up_tokenization_spaces=False)
        if cut:
            assert len(ids) == most and expected.startswith(decoded.rstrip("\ufffd"))  # may end inside a character
        else:
            assert decoded == expected
    if name != "thinking":  # whose turns begin with that token
        assert found.prompt.tolist().count(tokenizer.bos_token_id) == (name == "bos, eos")
    assert prompt.strip() in tokenizer.decode(found.prompt.tolist(), clean_up_tokenization_spaces=False)


letters = st.text("abc🙂", min_size=1, max_size=24)


@FUZZ
@given(letters, letters, letters, st.integers(1, 12), st.integers(1, 12), st.none() | st.integers(2, 30))
def test_prompt_and_completion_have_no_more_than_their_limits_and_no_less_than_these_allow(
    prompt: str, chosen: str, rejected: str, most_prompt: int, room: int, most_completion: int | None
) -> None:
    """Each part is the longest that all limits allow, given the prompt's own cut; what is lost is counted."""
    pair, tokenizer = Preference(prompt, chosen, rejected + "!", None, WHERE), TOKENIZERS["bos, eos"]
    (whole,), _, _ = tokenize_preferences([pair], tokenizer, Tokenization(), show_progress=False)
    limits = {"max_prompt_length": most_prompt, "max_completion_length": most_completion}
    room = room if most_completion is None else min(room, most_completion - 1)  # more would cut nothing
    options = Tokenization(**limits, max_length=most_prompt + room)
    try:
        (found,), _, counts = tokenize_preferences([pair], tokenizer, options, show_progress=False)
    except DataError as error:
        assert "dropped_identical 1" in str(error)
        return
    assert len(found.prompt) == min(len(whole.prompt), most_prompt)
    assert counts["prompt_truncated"] == (len(found.prompt) < len(whole.prompt))
    for side in ("chosen", "rejected"):
        ids, all_ids = getattr(found, side), getattr(whole, side)
        assert ids.equal(all_ids[: len(ids)]) and counts[f"{side}_truncated"] == (len(ids) < len(all_ids))
        assert len(found.prompt) + len(ids) <= most_prompt + room and len(ids) <= (most_completion or len(ids))
        full = len(found.prompt) + len(ids) == most_prompt + room or len(ids) == most_completion
        assert full or len(ids) == len(all_ids)


@FUZZ
@given(st.text("ab :.|[]", min_size=1, max_size=12), st.text("ab :.|[]", min_size=1, max_size=12))
def test_a_tokenizer_that_marks_the_start_of_a_text_gives_the_continuation_without_the_mark(
    prompt: str, completion: str
) -> None:
    for legacy in (False, True):
        tokenizer = sentencepiece_like(legacy=legacy)
        pair = Preference(prompt, completion, completion + "|", None, WHERE)
        ids = Encoder(tokenizer, chat=False).encode_pairs([pair])[0].chosen
        pieces = tokenizer.convert_ids_to_tokens(ids)
        assert pieces[-1] == "</s>" and "".join(pieces[:-1]).replace("▁", " ") == completion


@FUZZ
@given(st.lists(st.tuples(text, text, text), min_size=1, max_size=8))
def test_every_pair_is_kept_or_counted(texts: list[tuple[str, str, str]]) -> None:
    pairs = [Preference(*three, None, WHERE) for three in texts]
    pairs = [pair for pair in pairs if problem(pair) is None]
    options, counts = Tokenization(max_prompt_length=20, max_completion_length=8), Counter()
    try:
        found, kept, counts = tokenize_preferences(pairs, TOKENIZERS["plain"], options, show_progress=False)
    except DataError as error:
        assert "no pair is left" in str(error)
        return
    dropped = sum(counts[name] for name in counts if name.startswith("dropped"))
    assert len(found) == len(kept) == counts["kept"] == len(pairs) - dropped
    assert all(0 < len(ids) <= 20 for pair in found for ids in pair[:3])

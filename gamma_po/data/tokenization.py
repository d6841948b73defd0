"""From preferences to token ids, with an exact boundary between prompt and completion."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gamma_po.data.encoding import EncodedPair, Encoder
from gamma_po.data.formatting import Preference
from gamma_po.data.messages import Prompt
from gamma_po.errors import ConfigError, DataError, require
from gamma_po.progress import track

Template = Literal["auto", "chat", "text"]
Overlong = Literal["truncate", "drop", "error"]

PAIRS_PER_CALL = 256  # a fast tokenizer spreads one call over the cores
COUNTS = (
    "pairs", "kept", "prompt_truncated", "chosen_truncated", "rejected_truncated",
    "dropped_overlong", "dropped_identical", "dropped_end_inside", "dropped_marker_inside",
)  # fmt: skip
LONGER = "allowed: a higher limit, or data.tokenization.overlong: truncate or drop"
LARGE = 20_480  # pairs; smaller sets are done before several processes have started


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
        max_completion_length: tokens, >= 1. Longer completions lose tokens on the right, and thus their EOS. May be
            null with `max_length`, which then alone limits them.
        max_length: tokens of prompt and completion together, > `max_prompt_length`; null for no such limit. Behind a
            prompt that has n tokens after its own cut, both completions keep their first `max_length - n`.
            The published γ-SimPO and SimPO runs have 2048, with prompts of 1800, under other rules: they cut a prompt
            only where it and the longer completion exceed `max_length` together, and if these still do, both
            completions keep `max_length - max_prompt_length` tokens, however short the prompt is.
        overlong: cut what is longer, drop the pair, or stop.

    Raises:
        ConfigError: a value is not allowed.
    """

    template: Template = "auto"
    max_prompt_length: int = 512
    max_completion_length: int | None = 512
    max_length: int | None = None
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        for name, allowed in {"template": get_args(Template), "overlong": get_args(Overlong)}.items():
            value = getattr(self, name)
            require(value in allowed, f"data.tokenization.{name}", value, ", ".join(allowed))
        prompt, completion, both = self.max_prompt_length, self.max_completion_length, self.max_length
        require(prompt >= 1, "data.tokenization.max_prompt_length", prompt, "an integer >= 1")
        possible = both is not None if completion is None else completion >= 1
        allowed = "an integer >= 1, or null with data.tokenization.max_length"
        require(possible, "data.tokenization.max_completion_length", completion, allowed)
        allowed = f"an integer > data.tokenization.max_prompt_length={prompt}, or null"
        require(both is None or both > prompt, "data.tokenization.max_length", both, allowed)
        if both is not None and completion is not None and both >= prompt + completion:
            raise ConfigError(
                f"data.tokenization.max_length={both} cuts nothing, as prompts have at most {prompt} tokens and "
                f"completions {completion}; allowed: less than {prompt + completion}, or max_completion_length: null"
            )

    def room(self, prompt: int) -> int:
        """Return how many tokens a completion may have.

        Args:
            prompt: tokens of its prompt, before that is cut.

        >>> limits = Tokenization(max_prompt_length=8, max_completion_length=5, max_length=10)
        >>> [limits.room(prompt) for prompt in (2, 7, 8, 9)]
        [5, 3, 2, 2]
        """
        kept = min(prompt, self.max_prompt_length)
        limits = (self.max_completion_length, None if self.max_length is None else self.max_length - kept)
        return min(limit for limit in limits if limit is not None)


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
        before its end), dropped_marker_inside (a text that writes out a special token
        of the tokenizer; without a template, a prompt that begins with one is rendered already and may hold more).

    Raises:
        ConfigError: the tokenizer cannot do what the options ask for.
        DataError: a pair does not fit the template or the lengths, or none is left.
    """
    counts: Counter[str] = Counter()
    shown = track(preferences, "tokenising pairs", visible=show_progress)
    found = list(tokenize_stream(shown, tokenizer, options, counts))
    return [pair for _, _, pair in found], [index for index, _, _ in found], dict(counts)


def tokenize_stream(
    preferences: Iterable[Preference],
    tokenizer: PreTrainedTokenizerBase,
    options: Tokenization,
    counts: Counter[str],
    *,
    processes: int = 1,
) -> Iterator[tuple[int, Preference, TokenizedPair]]:
    """Tokenise pairs as they come, holding few of them; see `tokenize_preferences`.

    Args:
        preferences: pairs that have no `problem`.
        tokenizer: the policy's.
        options: how.
        counts: filled with the counts.
        processes: from pair LARGE on, so many processes encode.

    Yields:
        Position, pair and tokens of each pair that is kept, in order.

    Raises:
        ConfigError: the tokenizer cannot do what the options ask for.
        DataError: when the iteration gets to a pair that cannot be used, or to the end without one.
    """
    encoder = make_encoder(tokenizer, options)
    counts.update(dict.fromkeys(COUNTS, 0))
    for part, encoded in _encode_parts(preferences, encoder, processes):
        for preference, ids in zip(part, encoded, strict=True):
            index = counts["pairs"]
            counts["pairs"] += 1
            pair = _fit(ids, preference, tokenizer, options, counts)
            if pair is not None:
                counts["kept"] += 1
                yield index, preference, pair
    if not counts["kept"]:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"no pair is left after tokenisation: {found}; at least one is needed")


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
    encoder = make_encoder(tokenizer, options)
    if isinstance(prompt, Preference):
        location, text = prompt.location, encoder.render_pair(prompt)[0]
    else:
        location, text = "prompt", encoder.render_prompt(prompt, "prompt")
    ids = encoder.encode_prompts([text], [location])[0]
    if len(ids) > options.max_prompt_length and options.overlong != "truncate":
        raise DataError(f"{location}: too long: prompt has {len(ids)} of {options.max_prompt_length} tokens; {LONGER}")
    return _tensor(_cut_prompt(ids, options.max_prompt_length, tokenizer.bos_token_id))


def make_encoder(tokenizer: PreTrainedTokenizerBase, options: Tokenization) -> Encoder:
    """Return an encoder with or without the chat template, as the options ask.

    Raises:
        ConfigError: the tokenizer cannot do it.
    """
    possible = options.template != "chat" or bool(tokenizer.chat_template)
    allowed = "auto or text, as the tokenizer has no chat template"
    require(possible, "data.tokenization.template", options.template, allowed)
    return Encoder(tokenizer, chat=bool(tokenizer.chat_template) and options.template != "text")


def _encode_parts(
    preferences: Iterable[Preference], encoder: Encoder, processes: int
) -> Iterator[tuple[list[Preference], list[EncodedPair]]]:
    """Encode part after part, in this process up to LARGE pairs, then in several."""
    rows = iter(preferences)
    parts = iter(lambda: list(islice(rows, PAIRS_PER_CALL)), [])
    for part in islice(parts, LARGE // PAIRS_PER_CALL):
        yield part, encoder.encode_pairs(part)
    if processes == 1:
        for part in parts:
            yield part, encoder.encode_pairs(part)
        return
    first = next(parts, None)
    if first is not None:
        yield from _encode_in_processes(chain([first], parts), encoder, processes)


def _encode_in_processes(
    parts: Iterable[list[Preference]], encoder: Encoder, processes: int
) -> Iterator[tuple[list[Preference], list[EncodedPair]]]:
    """Encode in order; so many parts are under way that no process waits, and no more."""
    waiting: deque[tuple[list[Preference], Future[list[EncodedPair]]]] = deque()
    pool = ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(encoder.tokenizer, encoder.chat))
    try:
        for part in parts:
            waiting.append((part, pool.submit(_encode_here, part)))
            if len(waiting) >= 2 * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenises ended unexpectedly, perhaps for want of memory; allowed: fewer of them with "
            "data.tokenizing_processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Encoder] = {}  # of a process that tokenises


def _start_worker(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["encoder"] = Encoder(tokenizer, chat=chat)


def _encode_here(part: list[Preference]) -> list[EncodedPair]:
    return _worker["encoder"].encode_pairs(part)


def _fit(
    ids: EncodedPair,
    pair: Preference,
    tokenizer: PreTrainedTokenizerBase,
    options: Tokenization,
    counts: Counter[str],
) -> TokenizedPair | None:
    """Apply the limits to a pair, and count what happens to it."""
    if any(_ends_inside(text, tokenizer.eos_token) for text in (pair.chosen, pair.rejected)):
        counts["dropped_end_inside"] += 1
        return None
    if ids.marked:
        counts["dropped_marker_inside"] += 1
        return None
    most = options.room(len(ids.prompt))
    limits = {"prompt": options.max_prompt_length, "chosen": most, "rejected": most}
    lengths = {name: len(part) for name, part in zip(limits, ids[:3], strict=True)}
    too_long = [name for name, length in lengths.items() if length > limits[name]]
    if too_long and options.overlong == "error":
        found = ", ".join(f"{name} has {lengths[name]} of {limits[name]}" for name in too_long)
        both = "" if most == options.max_completion_length else f", with max_length={options.max_length} for both"
        raise DataError(f"{pair.location}: too long: {found} tokens{both}; {LONGER}")
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

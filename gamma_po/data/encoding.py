"""From text to uncut token ids: the chat template applied once, the boundary exact, one BOS, one EOS."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from gamma_po.data.formatting import Preference, Prompt, chat_text
from gamma_po.data.messages import OF_A_TOOL, Message, texts_of
from gamma_po.errors import ConfigError, DataError

ANCHORS = ("\n", ".", "|")  # text to put before a completion that must not look like the start of a text
DISTINCTIVE = 8  # characters around a message that nobody writes by chance
AS_TEXT = "data.tokenization.template: text with prompts of plain text"


class EncodedPair(NamedTuple):
    """Token ids of a pair before anything is cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    marked: bool  # whether a text holds one of the tokenizer's special tokens


class _Frame(NamedTuple):
    """What the chat template writes around the messages of a conversation, given their roles."""

    opening: str  # before the first message that is not a system message, without BOS
    closing: str  # after the last message of the prompt
    before_answer: str  # between that and the answer, e.g. an empty block of thoughts
    special: tuple[str, ...]  # special tokens in all of it


class Encoder:
    """A tokenizer and what has been found out about it.

    Args:
        tokenizer: the policy's.
        chat: render with its chat template; otherwise prompts and completions are text as they are.

    Raises:
        ConfigError: the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token (eos_token); completions need one")
        self.tokenizer = tokenizer
        self.chat = chat
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special_texts = tuple({*added, *tokenizer.all_special_tokens})
        self.special_ids = set(tokenizer.convert_tokens_to_ids(list(self.special_texts)))
        self._find_special = re.compile("|".join(map(re.escape, self.special_texts))).search
        self.marks_start = self._marks_start()
        self.arguments_as_text: bool | None = None  # how the template takes a call's; None before the first
        self._frames: dict[tuple[tuple[object, ...], ...], _Frame] = {}  # by the shape of the conversation

    def encode_pairs(self, preferences: Sequence[Preference]) -> list[EncodedPair]:
        """Ids of each pair, with EOS."""
        locations = [pair.location for pair in preferences]
        marked = [self._is_marked(pair) for pair in preferences]
        prompts, *sides = zip(*map(self.render_pair, preferences), strict=True)
        columns = [self.encode_prompts(prompts, locations)]
        for texts in sides:
            columns.append([self._end(ids) for ids in self._continuations(prompts, texts, locations)])
        return [EncodedPair(*ids) for ids in zip(*columns, marked, strict=True)]

    def encode_prompts(self, texts: Sequence[str], locations: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts; plain text gets the tokenizer's leading tokens, unless they are there."""
        encoded = self._encode(texts)
        for text, ids, location in zip(texts, encoded, locations, strict=True):
            if not ids:
                raise DataError(f"{location}: the prompt {text!r} has no tokens; at least one is needed")
        leading = [] if self.chat else self._leading_ids(texts[0], encoded[0])
        return [ids if ids[: len(leading)] == leading else leading + ids for ids in encoded]

    def render_prompt(self, prompt: Prompt, location: str) -> str:
        """The text before an answer without thoughts."""
        if self.chat:
            frame = self._frame(prompt, location)
            self._refuse_rendered(texts_of(prompt), prompt, location)
            return self._chat_text(prompt, None, location) + frame.before_answer
        if not isinstance(prompt, str):
            has = "has tools" if "tools" in prompt[0] else "is a conversation"
            raise DataError(
                f"{location}: the prompt {has}, which needs a chat template; allowed: data.tokenization.template: auto "
                "with a tokenizer that has one, or prompts of plain text"
            )
        return prompt

    def render_pair(self, pair: Preference) -> tuple[str, str, str]:
        """The text before the completions, and both of them.

        What the template puts before every answer (an empty block of thoughts) belongs to the prompt, unless a
        completion has thoughts of its own there.
        """
        if not self.chat:
            return self.render_prompt(pair.prompt, pair.location), pair.chosen, pair.rejected
        before_answer = self._frame(pair.prompt, pair.location).before_answer
        prompt = self._chat_text(pair.prompt, None, pair.location)
        sides = [self._render_completion(pair, completion, prompt) for completion in (pair.chosen, pair.rejected)]
        if before_answer and all(side.startswith(before_answer) for side in sides):
            prompt += before_answer
            sides = [side.removeprefix(before_answer) for side in sides]
        return prompt, sides[0], sides[1]

    def _render_completion(self, pair: Preference, completion: str, prompt: str) -> str:
        """The text after the prompt, without the white space templates add behind their end-of-turn token."""
        text = self._chat_text(pair.prompt, completion, pair.location)
        if not text.startswith(prompt):
            raise DataError(
                f"{pair.location}: with an answer, the chat template changes the conversation before it, so "
                f"prompt and completion cannot be told apart; allowed: a template that only appends, or {AS_TEXT}"
            )
        text = text[len(prompt) :]
        if "".join(completion.split()) not in "".join(text.split()):
            raise DataError(
                f"{pair.location}: the chat template leaves out or changes part of the completion "
                f"{completion[:50]!r}; allowed: a template that keeps it, or {AS_TEXT}"
            )
        return text.rstrip() if text.rstrip().endswith(self.special_texts) else text

    def _chat_text(self, prompt: Prompt, completion: str | None, location: str) -> str:
        """The rendered conversation, the arguments of its calls in the form that the template takes."""
        if self.arguments_as_text and not isinstance(prompt, str):
            prompt = tuple(map(_with_arguments_as_text, prompt))
        return chat_text(prompt, completion, self.tokenizer, location)

    def _find_form_of_arguments(self, messages: Sequence[Message], location: str) -> None:
        """Find out, at the first call, whether the template joins arguments to other text, as text of its own."""
        arguments = [call["function"]["arguments"] for turn in messages for call in turn.get("tool_calls", ())]
        if not arguments or self.arguments_as_text is not None:
            return
        try:
            text = chat_text(tuple(messages), None, self.tokenizer, location)
        except DataError as error:
            if isinstance(error.__cause__, TypeError):  # of an object that is added to a text
                self.arguments_as_text = True
            return
        self.arguments_as_text = any(str(given) in text for given in arguments)  # in Python's notation, not JSON's

    def _frame(self, prompt: Prompt, location: str) -> _Frame:
        """What surrounds conversations with these roles, found by rendering one with marks for contents."""
        turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        shape = tuple(
            (turn["role"], bool(turn["content"]), len(turn.get("tool_calls", ())), *(key in turn for key in OF_A_TOOL))
            for turn in turns
        )
        shape += ((len(turns[0].get("tools", ())),),)
        if shape not in self._frames:
            self._frames[shape] = self._find_frame(turns, location)
        return self._frames[shape]

    def _find_frame(self, turns: Sequence[Message], location: str) -> _Frame:
        roles = [turn["role"] for turn in turns]
        marks = [f"mark{i}of{role}" for i, role in enumerate(roles)]
        messages = tuple(_marked(turn, mark) for turn, mark in zip(turns, marks, strict=True))
        self._find_form_of_arguments(messages, location)
        head = self._chat_text(messages, None, location)
        whole = self._chat_text(messages, "markofanswer", location)
        if any(mark not in head for tool in messages[0].get("tools", ()) for mark in _marks_of(tool)):
            raise DataError(
                f"{location}: the chat template has no place for descriptions of tools in a conversation with the "
                f"roles {', '.join(roles)}; allowed: a template that writes them, or columns.tools: null, which "
                "leaves them unread"
            )
        lost = [f"{message['role']} message" for message in messages if message["content"] not in head]
        lost += [
            "calls of tools"
            for message in messages
            for call in message.get("tool_calls", ())
            if not all(text in head for text in (call["function"]["name"], *call["function"]["arguments"].values()))
        ]
        lost += [] if "markofanswer" in whole else ["last assistant message"]
        if lost:
            raise DataError(
                f"{location}: the chat template leaves out the {lost[0]} of a conversation with the roles "
                f"{', '.join(roles)}; allowed: a template that writes it, or data without it"
            )
        first = next((mark for role, mark in zip(roles, marks, strict=True) if role == "user"), marks[0])
        opening = head[: head.index(first)].removeprefix(self.tokenizer.bos_token or "")
        before_answer = whole[len(head) : whole.index("markofanswer")] if whole.startswith(head) else ""
        return _Frame(
            opening=opening.strip(),
            closing=head[head.index(marks[-1]) + len(marks[-1]) :].strip(),
            before_answer=before_answer,
            special=tuple(text for text in self.special_texts if text in whole),
        )

    def _is_marked(self, pair: Preference) -> bool:
        """Whether a text of the pair holds special tokens of the tokenizer: they would not be read as text.

        Without a template, a prompt that begins with one is rendered already and may hold more, and its completions
        may end with one.

        Raises:
            DataError: a text is a rendered conversation, so the template would be applied twice.
        """
        turns = texts_of(pair.prompt)
        completions = [text.rstrip() for text in (pair.chosen, pair.rejected)]
        if self.chat:
            self._refuse_rendered([*turns, *completions], pair.prompt, pair.location)
        rendered = not self.chat and turns[0].lstrip().startswith(self.special_texts)
        ends = self.special_texts if rendered else (self.tokenizer.eos_token,)
        read = [*([] if rendered else turns), *(_without_end(text, ends) for text in completions)]
        return any(self._find_special(text) for text in read)

    def _refuse_rendered(self, texts: Sequence[str], prompt: Prompt, location: str) -> None:
        frame = self._frame(prompt, location)
        for text in texts:
            if found := _rendered(text.strip(), frame, self.tokenizer.bos_token or ""):
                raise DataError(
                    f"{location}: {text.strip()[:50]!r} already has the chat template's {found!r}, and the "
                    "template would be applied twice; allowed: texts without it, or data.tokenization.template: text"
                )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def _leading_ids(self, text: str, ids: list[int]) -> list[int]:
        """What the tokenizer by itself puts before a text: BOS, or nothing."""
        whole = self.tokenizer(text, verbose=False).input_ids
        start = next((k for k in range(len(whole)) if whole[k : k + len(ids)] == ids), None)
        assert start is not None, "special tokens surround a text and do not change it"
        return whole[:start]

    def _marks_start(self) -> bool:
        """Whether the first word of a text is encoded differently from the same word after other text."""
        alone, anchor, after = self._encode(["a", ANCHORS[0], ANCHORS[0] + "a"])
        return after[: len(anchor)] == anchor and after[len(anchor) :] != alone

    def _continuations(self, prompts: Sequence[str], texts: Sequence[str], locations: Sequence[str]) -> list[list[int]]:
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


def _without_end(text: str, ends: Sequence[str]) -> str:
    """A text without the token at its end, if that is one of these."""
    end = next((end for end in ends if text.endswith(end)), "")
    return text.removesuffix(end)


def _with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [(call, call["function"]) for call in message["tool_calls"]]
    written = [
        {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
        for call, function in calls
    ]
    return {**message, "tool_calls": written}


def _marked(message: Message, mark: str) -> Message:
    """A message of the same shape that says nothing but marks."""
    calls = [
        {**call, "function": {"name": f"{mark}calls{k}", "arguments": {"argument": f"{mark}gives{k}"}}}
        for k, call in enumerate(message.get("tool_calls", ()))
    ]
    marked = {**message, "content": mark if message["content"] or not calls else ""}
    if "tools" in message:
        marked["tools"] = [_marked_tool(f"tool{k}ofmarks") for k, _ in enumerate(message["tools"])]
    return {**marked, "tool_calls": calls} if calls else marked


def _marked_tool(mark: str) -> dict[str, Any]:
    """A description of a tool with all that templates may ask for."""
    argument = {"type": "string", "description": f"{mark}argument"}
    parameters = {"type": "object", "properties": {"argument": argument}, "required": ["argument"]}
    return {"type": "function", "function": {"name": mark, "description": f"{mark}does", "parameters": parameters}}


def _marks_of(tool: dict[str, Any]) -> tuple[str, str, str]:
    """What a template must write of a `_marked_tool`: its name, what it does, and what its argument is."""
    name = tool["function"]["name"]
    return name, f"{name}does", f"{name}argument"


def _rendered(text: str, frame: _Frame, bos: str) -> str | None:
    """The marks of the template that show that a text is a rendered conversation already, or None."""
    if text.startswith(frame.special) and sum(text.count(special) for special in frame.special) >= 2:
        return next(special for special in frame.special if text.startswith(special))
    distinctive = frame.opening and frame.closing and len(frame.opening) + len(frame.closing) >= DISTINCTIVE
    around = text.removeprefix(bos).startswith(frame.opening) and text.endswith(frame.closing)
    return f"{frame.opening} … {frame.closing}" if distinctive and around else None

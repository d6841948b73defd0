"""Conversations as data sets write them: role/content, ShareGPT's from/value, and "Human:/Assistant:" transcripts."""

from __future__ import annotations

import re
from typing import Any

from gamma_po.data.sources import json_kind
from gamma_po.errors import DataError

Message = dict[str, str]  # role, content
Prompt = str | tuple[Message, ...]  # plain text, or a conversation that does not end with the assistant

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def text_or_messages(value: Any, where: str) -> str | tuple[Message, ...]:
    """Check a value that must be text, a message or a list of messages.

    Args:
        value: of a column.
        where: row and column, for errors.

    Raises:
        DataError: it is something else; says what was found and what is allowed.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()):
        value = [value]
    if isinstance(value, list | tuple) and value:
        return tuple(_message(item, f"{where}, message {position}") for position, item in enumerate(value, start=1))
    found = "an empty list" if isinstance(value, list | tuple) else json_kind(value)
    raise DataError(f"{where} must hold text or a list of messages, found {found}")


def is_transcript(text: str) -> bool:
    """Whether a text is a whole conversation in HH-RLHF's manner.

    >>> is_transcript("\\n\\nHuman: Hi\\n\\nAssistant: Hello"), is_transcript("Human: nature is hard to grasp")
    (True, False)
    """
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def transcript_messages(text: str) -> tuple[Message, ...]:
    """Split a transcript into messages; the space after each speaker's colon is not part of what is said.

    >>> [message["content"] for message in transcript_messages("\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n")]
    ['Hi', 'Hello\\n']
    """
    parts = TURN.split(text.lstrip())[1:]
    return tuple(
        {"role": SPEAKERS[speaker], "content": said.removeprefix(" ")}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _message(item: Any, where: str) -> Message:
    """Role and content of a message; what else it holds (ids, scores) is not part of the conversation."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: a message must be an object with role and content, found {json_kind(item)}")
    if "role" in item and "content" in item:
        role, content, roles = item["role"], item["content"], dict.fromkeys(ROLES)
    elif "from" in item and "value" in item:
        role, content, roles = item["from"], item["value"], SHAREGPT_ROLES
    else:
        raise DataError(
            f"{where}: a message needs role and content, found {', '.join(map(str, item)) or 'nothing'}; allowed "
            "also: from and value"
        )
    if not isinstance(role, str) or role not in roles:
        hint = "; calls of tools cannot be trained on" if role == "function_call" else ""
        raise DataError(f"{where}: unknown role {role!r}; allowed: {', '.join(roles)}{hint}")
    unsupported = [key for key in UNSUPPORTED_KEYS if item.get(key)]
    if unsupported:
        raise DataError(f"{where}: {', '.join(unsupported)} cannot be trained on; allowed: role and content")
    return {"role": roles[role] or role, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """Text, or the text of OpenAI-like parts that are all text."""
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, found {json_kind(content)}")
    return content

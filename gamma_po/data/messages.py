"""Conversations as data sets write them: role/content, ShareGPT's from/value, and "Human:/Assistant:" transcripts."""

from __future__ import annotations

import json
import re
from typing import Any

from gamma_po.data.sources import json_kind
from gamma_po.errors import DataError

# role, content; an assistant's perhaps tool_calls, a tool's perhaps name and tool_call_id; the first one perhaps tools
Message = dict[str, Any]
Prompt = str | tuple[Message, ...]  # plain text, or a conversation that does not end with the assistant

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
CALLER = "function_call"  # the role in which ShareGPT files write a call of a tool
UNSUPPORTED_KEYS = ("function_call", "reasoning_content", "reasoning", "thinking")
DEEPEST = 100  # levels of objects and lists in a tool; templates and JSON give up somewhere beyond
OF_A_TOOL = ("name", "tool_call_id")
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:""")
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


def waits_for_an_answer(text: str) -> bool:
    """Whether a text is a transcript that ends with a human's words, or with the assistant's name alone.

    >>> [waits_for_an_answer("Human: Hi\\n\\nAssistant:" + end) for end in ("", " Hello", " Hello\\n\\nHuman: Bye")]
    [True, False, True]
    """
    if not is_transcript(text):
        return False
    last = transcript_messages(text)[-1]
    return (last["role"] == "user") == bool(last["content"].strip())


def is_written_out(text: str) -> bool:
    """Whether a text is a list of messages as JSON or Python writes one, e.g. in a cell of a CSV file.

    >>> is_written_out("[{'role': 'user', 'content': 'Hi'}]"), is_written_out("[1] who has this role?")
    (True, False)
    """
    return WRITTEN_OUT.match(text) is not None and text.rstrip().endswith("]")


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
    if "role" in item and ("content" in item or item.get("tool_calls")):
        role, content, roles = item["role"], item.get("content"), dict.fromkeys(ROLES)
    elif "from" in item and "value" in item:
        role, content, roles = item["from"], item["value"], SHAREGPT_ROLES
        if role == CALLER and isinstance(content, str):
            return {"role": "assistant", "content": "", "tool_calls": [_call(content, where)]}
    else:
        raise DataError(
            f"{where}: a message needs role and content, found {', '.join(map(str, item)) or 'nothing'}; allowed "
            "also: from and value"
        )
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{where}: unknown role {role!r}; allowed: {', '.join(roles)}")
    unsupported = [key for key in UNSUPPORTED_KEYS if item.get(key)]
    if unsupported:
        raise DataError(f"{where}: {', '.join(unsupported)} is not read; allowed: role, content and tool_calls")
    role, calls = roles[role] or role, item.get("tool_calls")
    if not calls:
        named = {key: item[key] for key in OF_A_TOOL if role == "tool" and isinstance(item.get(key), str)}
        return {"role": role, "content": _content(content, where), **named}
    if role != "assistant" or not isinstance(calls, list | tuple):
        raise DataError(
            f"{where}: tool_calls must be a list, of an assistant message; found {json_kind(calls)}, {role}"
        )
    said = "" if content is None else _content(content, where)
    return {"role": role, "content": said, "tool_calls": [_call(call, where) for call in calls]}


def texts_of(prompt: Prompt) -> list[str]:
    """Return all that a prompt says.

    >>> texts_of("Hi"), texts_of(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    (['Hi'], ['Be brief.', 'Hi'])
    """
    return [prompt] if isinstance(prompt, str) else [text for message in prompt for text in _message_texts(message)]


def _message_texts(message: Message) -> list[str]:
    """All that a message says: tools, its content, and the names and arguments of the tools it calls."""
    tools = [json.dumps(tool, ensure_ascii=False) for tool in message.get("tools", ())]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    said = [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
    return [*tools, message["content"], *(text for texts in said for text in texts)]


def described_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return descriptions of tools as chat templates expect them, none where the value is empty.

    Keys that hold null are left out: Parquet puts them into objects that did not have them.

    Args:
        value: of a column: objects with a name, by themselves or each as the `function` of another; or their JSON text.
        where: row and column, for errors.

    Raises:
        DataError: it is something else; says what was found and what is allowed.
    """
    empty = value is None or (isinstance(value, str) and value.strip() in ("", "null"))
    tools = [] if empty else _loaded(value)
    if not isinstance(tools, list | tuple):
        raise DataError(
            f"{where} must hold a list of descriptions of tools, or its JSON text, found {_shown(value)}; a "
            "column that means something else is left unread with columns.tools: null"
        )
    return [_tool(tool, f"{where}, tool {position}") for position, tool in enumerate(tools, start=1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    found = _loaded(tool)
    function = (found.get("function") or found) if isinstance(found, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f"{where}: the description of a tool needs a name, found {_shown(tool)}; a column that means something "
            "else is left unread with columns.tools: null"
        )
    _check_json(function, where)
    return {"type": "function", "function": _without_nulls(function)}


def _check_json(value: Any, where: str) -> None:
    """Refuse what a file can hold and a chat template cannot write: a date, NaN, hundreds of levels."""
    if _depth(value) > DEEPEST:
        raise DataError(f"{where}: objects and lists in one another; allowed: {DEEPEST} levels")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the name, description and arguments of a tool must be JSON: {error}") from error


def _depth(value: Any) -> int:
    """Return how many levels of objects and lists there are, without recursion."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list | tuple)]:
        depth += 1
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def _without_nulls(value: Any) -> Any:
    """The value without those keys of its objects, at any depth, that hold null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:80]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as chat templates expect it: arguments as an object, which many files write as JSON text."""
    found = _loaded(call)
    found = (found.get("function") or found) if isinstance(found, dict) else {}
    found = found if isinstance(found, dict) else {}
    arguments = _loaded(found.get("arguments"))
    if not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        raise DataError(
            f"{where}: a call of a tool needs a name and arguments (an object, or its JSON text), found {_shown(call)}"
        )
    _check_json(arguments, where)
    known = {"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}
    return {"type": "function", **known, "function": {"name": found["name"], "arguments": arguments}}


def _loaded(value: Any) -> Any:
    """What a JSON text says; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def _content(content: Any, where: str) -> str:
    """Text, or the text of OpenAI-like parts that are all text."""
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, found {json_kind(content)}")
    return content

"""A read row: the one shape that every format is brought into, and what its parts are called.

Names are those of the chat completions API and of TRL. A key that a row has not is not in its shape:

| shape | what it is |
|---|---|
| `{"messages": [Message], "tools"?}` | a conversation; it ends with the answer, or with the prompt where there is none |
| `{"prompt": str, "completion"?: str}` | plain text, rendered with no template |
| `{"text": str}` | plain text |
| `{"prompt", "chosen", "rejected", "tools"?}` | a pair: all plain text, or all lists of Message |
| any with an answer, and `"label": bool` | whether the answer is a good one |
"""

from __future__ import annotations

import json
from typing import Any, Literal, NotRequired, TypedDict

Shape = dict[str, Any]
"""A read row, as the table above has it."""
Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class BadRow(ValueError):
    """A row that is not of the format, or not fit to learn from. The message says where, what was found and what to write."""


class Function(TypedDict):
    """What a call names."""

    name: str
    arguments: Any
    """Parsed: an object nearly always. Text that is no JSON is refused."""


class ToolCall(TypedDict):
    """One call of the assistant."""

    type: Literal["function"]
    function: Function
    id: NotRequired[str]


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str | None
    """None where the row has null, or nothing, beside tool calls; templates tell that from an empty text."""
    reasoning_content: NotRequired[str]
    """What was thought before the answer, whatever the row calls it: reasoning_content, reasoning or thinking."""
    tool_calls: NotRequired[list[ToolCall]]
    name: NotRequired[str]
    """Of a tool's result."""
    tool_call_id: NotRequired[str]
    """Of a tool's result."""
    weight: NotRequired[Literal[0]]
    """The assistant's turn is context, and is not learned."""


def is_conversation(row: Shape) -> bool:
    """Whether a row holds turns, which a chat template renders."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def messages_of(row: Shape) -> list[Message]:
    """Every turn of a row, of both answers where it has two."""
    return [turn for key, value in row.items() if isinstance(value, list) and key != "tools" for turn in value]


def strings(row: Shape) -> list[str]:
    """What is said in a row: contents and plain texts."""
    found = [value for value in row.values() if isinstance(value, str)]
    return found + [turn["content"] for turn in messages_of(row) if turn["content"]]


def all_strings(row: Shape) -> list[str]:
    """Every text of a row that comes from the user's data: also reasoning, tools, calls, names and identifiers."""
    found = strings(row)
    for turn in messages_of(row):
        if len(turn) > 2:
            found += _leaves([value for key, value in turn.items() if key not in ("role", "content")])
    return found + _leaves(row["tools"]) if "tools" in row else found


def _leaves(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *_leaves(inner))]
    return [text for inner in value for text in _leaves(inner)] if isinstance(value, list) else []


def system_prompt(row: Shape) -> str:
    """The system prompt of a row, or an empty string."""
    head = next((value for key, value in row.items() if key in ("messages", "prompt") and isinstance(value, list)), None)
    return str(head[0]["content"] or "") if head and head[0]["role"] == "system" else ""


def dumps(row: Shape) -> str:
    """A row as JSON, its keys in the order that the row has: a template shows a tool's schema and arguments in that order."""
    return json.dumps(row, ensure_ascii=False)


def on_the_wire(messages: list[Message]) -> list[dict[str, Any]]:
    """Turns as the chat completions API takes them: a call's arguments are text there, and weights unknown."""
    sent = []
    for turn in messages:
        told: dict[str, Any] = {key: value for key, value in turn.items() if key != "weight"}
        if "tool_calls" in turn:
            told["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
                for call in turn["tool_calls"]
            ]
        sent.append(told)
    return sent

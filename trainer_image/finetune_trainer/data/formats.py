"""The formats of a row: what they look like, what is wrong with one, and their common shape.

Common shapes: {"messages": [{"role", "content"}, ...]}, {"prompt": str, "completion": str}, {"text": str}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import UserError

ROLES = ("system", "user", "assistant")
FORMATS = ("messages", "prompt-completion", "text")
_SHAPE = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "prompt-completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}


class BadRow(ValueError):
    """A row that is not of the format, or not fit to learn from."""


def looks_like(row: dict[str, Any]) -> str | None:
    """The format whose columns a row has."""
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt-completion"
    if "text" in row:
        return "text"
    return None


def detect(sample: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """(format, reason) of the first rows. Raises UserError when they are of none or of several formats."""
    seen: Counter[str | None] = Counter()
    columns: set[str] = set()
    for row in sample:
        seen[looks_like(row)] += 1
        columns.update(map(str, row))
    known = [name for name in seen if name is not None]
    if len(known) > 1:
        counts = ", ".join(f"{count} {name or 'unknown'}" for name, count in seen.items())
        raise UserError(
            "MixedFormats",
            f"the first rows are of several formats ({counts}); split the data set, or set dataset.format and checks.invalidRows: drop",
        )
    if not known:
        shapes = "; ".join(f"{name}: {_SHAPE[name]}" for name in FORMATS)
        found = ", ".join(sorted(columns)[:20]) or "none"
        raise UserError("UnknownFormat", f"no known format has the columns found ({found}). Expected one of {shapes}")
    column = {"messages": "'messages'", "prompt-completion": "'prompt' and 'completion'", "text": "'text'"}[known[0]]
    return known[0], f"rows have {column}"


def normalise(row: dict[str, Any], format_: str) -> dict[str, Any]:
    """The row in its common shape. Raises BadRow with what is wrong."""
    if format_ == "messages":
        return {"messages": _messages(row.get("messages"))}
    if format_ == "prompt-completion":
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return {"messages": _messages([*prompt, *completion])}
        return {"prompt": _text(prompt, "prompt"), "completion": _text(completion, "completion")}
    return {"text": _text(row.get("text"), "text")}


def _text(value: Any, field: str) -> str:
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, expected a string")
    if not value.strip():
        raise BadRow(f"{field} is empty")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadRow("messages is no list of turns" if value else "messages is missing or empty")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise BadRow(f"messages[{index}] is {type(turn).__name__}, expected an object with role and content")
        role = turn.get("role")
        if role not in ROLES:
            hint = "role is missing" if role is None else f"role {str(role)[:40]!r} is not one of {', '.join(ROLES)}"
            raise BadRow(f"messages[{index}]: {hint}")
        turns.append({"role": str(role), "content": _text(turn.get("content"), f"messages[{index}].content")})
    _check_order([turn["role"] for turn in turns])
    return turns


def _check_order(roles: list[str]) -> None:
    """System first if at all, then user and assistant in turn, an assistant last."""
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        raise BadRow("a system turn stands after the first turn")
    for index, role in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if role != expected:
            raise BadRow(f"turn {index + 1} is of {role}, expected {expected}: user and assistant must alternate, user first")
    if not turns or turns[-1] != "assistant":
        raise BadRow("the last turn is not the assistant's: there is no answer to learn")


def strings(row: dict[str, Any]) -> list[str]:
    """All texts of a row in its common shape that come from the user's data."""
    if "messages" in row:
        return [turn["content"] for turn in row["messages"]]
    return [value for value in row.values() if isinstance(value, str)]

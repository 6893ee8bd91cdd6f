"""The formats of a row: how each is recognised, what is wrong with a row, and its common shape.

Common shapes, which are TRL's: {"messages": [...]}, {"prompt", "completion"}, {"text"}, {"prompt", "chosen", "rejected"},
{"prompt", "completion", "label"}, {"prompt"}. Prompt and answers are strings, or lists of messages.
A format is added as one entry of FORMATS: its columns, an example for messages to people, and a function.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..process.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Shape = dict[str, Any]


class BadRow(ValueError):
    """A row that is not of the format, or not fit to learn from."""


@dataclass(frozen=True)
class Format:
    """One format of rows."""

    columns: tuple[str, ...]
    """Columns that a row of it has; with these it is recognised."""
    example: str
    """What a row looks like, for messages."""
    normalize: Callable[[dict[str, Any]], Shape]
    """The row in its common shape. Raises BadRow."""


def _text(value: Any, field: str) -> str:
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, expected a string")
    if not value.strip():
        raise BadRow(f"{field} is empty")
    if "\x00" in value:
        raise BadRow(f"{field} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{field} holds half of a surrogate pair") from None
    return value


def turns(value: Any, field: str = "messages") -> list[Shape]:
    """A checked list of messages: role, content, and tool calls where there are some."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV and Parquet files hold lists as JSON text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{field} is text, and no JSON list of turns") from None
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field} is no list of turns" if value else f"{field} is missing or empty")
    return [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, place: str) -> Shape:
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {type(turn).__name__}, expected an object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        hint = "role is missing" if role is None else f"role {str(role)[:40]!r} is not one of {', '.join(ROLES)}"
        raise BadRow(f"{place}: {hint}")
    calls = turn.get("tool_calls")
    if calls:
        if (
            role != "assistant"
            or not isinstance(calls, list)
            or not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls)
        ):
            raise BadRow(f'{place}.tool_calls is no list of {{"function": {{"name", "arguments"}}}} of the assistant')
        if not all(isinstance(c["function"].get("name"), str) and c["function"]["name"] for c in calls):
            raise BadRow(f"{place}.tool_calls: function.name is missing")
        content = turn.get("content") or ""
        return {
            "role": "assistant",
            "content": _text(content, f"{place}.content") if content else "",
            "tool_calls": [_call(c) for c in calls],
        }
    kept = {"role": str(role), "content": _text(turn.get("content"), f"{place}.content")}
    if role == "tool":
        kept.update({key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key)})
    return kept


def _call(call: Shape) -> Shape:
    function, arguments = call["function"], call["function"].get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise BadRow("tool_calls: function.arguments is text, and no JSON") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _check_order(messages: list[Shape], *, answer: bool = True) -> list[Shape]:
    """System first if at all, then user and assistant in turn, tool results after a tool call, an assistant last."""
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        raise BadRow("a system turn stands after the first turn")
    first = 1 if roles[0] == "system" else 0
    allowed: tuple[str, ...] = ("user",)
    for index in range(first, len(roles)):
        if roles[index] not in allowed:
            raise BadRow(
                f"turn {index - first + 1} is of {roles[index]}, expected {' or '.join(allowed)}: user and assistant must alternate, user first, "
                "and a tool's result follows the assistant's tool_calls"
            )
        if roles[index] == "assistant":
            allowed = ("tool",) if messages[index].get("tool_calls") else ("user",)
        else:
            allowed = ("assistant", "tool") if roles[index] == "tool" else ("assistant",)
    if len(roles) == first:
        raise BadRow("there is no turn of the user")
    if answer and roles[-1] != "assistant":
        raise BadRow("the last turn is not the assistant's: there is no answer to learn")
    if not answer and roles[-1] == "assistant":
        raise BadRow("the prompt ends with the assistant's turn")
    return messages


def _messages(row: Shape) -> Shape:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow("tools is text, and no JSON list") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise BadRow("tools is no list of tool definitions")
    return {"messages": _check_order(turns(row.get("messages"))), **({"tools": tools} if tools else {})}


def _prompt_completion(row: Shape) -> Shape:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": _check_order([*turns(prompt, "prompt"), *turns(completion, "completion")])}
    return {"prompt": _text(prompt, "prompt"), "completion": _text(completion, "completion")}


def _alpaca(row: Shape) -> Shape:
    extra = row.get("input")
    question = _text(row.get("instruction"), "instruction") + (f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else "")
    system = row.get("system")
    head = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return {
        "messages": [*head, {"role": "user", "content": question}, {"role": "assistant", "content": _text(row.get("output"), "output")}]
    }


_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


def _sharegpt(row: Shape) -> Shape:
    value = row.get("conversations")
    if not isinstance(value, list) or not value:
        raise BadRow("conversations is no list of turns")
    found = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"].strip() else []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise BadRow(f"conversations[{index}] is {type(turn).__name__}, expected an object with from and value")
        role = _SHAREGPT.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise BadRow(f"conversations[{index}]: from {str(turn.get('from'))[:40]!r} is not one of {', '.join(_SHAREGPT)}")
        found.append({"role": role, "content": _text(turn.get("value", turn.get("content")), f"conversations[{index}].value")})
    return {"messages": _check_order(found)}


def _preference(row: Shape) -> Shape:
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        good, bad = turns(chosen, "chosen"), turns(rejected, "rejected")
        if prompt is None:  # both hold the whole conversation: what they share is the prompt
            shared = 0
            while shared < min(len(good), len(bad)) - 1 and good[shared] == bad[shared]:
                shared += 1
            head, good, bad = good[:shared], good[shared:], bad[shared:]
        else:
            head = turns(prompt, "prompt") if isinstance(prompt, list) else [{"role": "user", "content": _text(prompt, "prompt")}]
        if not head:
            raise BadRow("chosen and rejected share no prompt")
        for field, answer in (("chosen", good), ("rejected", bad)):
            try:
                _check_order([*head, *answer])
            except BadRow as failure:
                raise BadRow(f"{field}: {failure}") from None
        shape: Shape = {"prompt": head, "chosen": good, "rejected": bad}
    else:
        shape = {"prompt": _text(prompt, "prompt"), "chosen": _text(chosen, "chosen"), "rejected": _text(rejected, "rejected")}
    if shape["chosen"] == shape["rejected"]:
        raise BadRow("chosen and rejected are the same: there is nothing to prefer")
    return shape


def _unpaired(row: Shape) -> Shape:
    label = row.get("label")
    if isinstance(label, str) and label.lower() in ("true", "false"):  # CSV
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise BadRow(f"label is {type(label).__name__}, expected true (a good answer) or false")
    return {**_prompt_completion(row), "label": label}


def _prompt_only(row: Shape) -> Shape:
    """A prompt, with what a reward compares with where that is there: `answer`, or `solution` as TRL's own data sets name it."""
    prompt, answer = row.get("prompt"), next((row[key] for key in ("answer", "solution") if row.get(key) is not None), None)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    told = _text(answer, "answer") if answer is not None else None
    if isinstance(prompt, list):
        messages = _check_order(turns(prompt, "prompt"), answer=False)
        return {"messages": messages + ([{"role": "assistant", "content": told}] if told is not None else [])}
    return {"prompt": _text(prompt, "prompt"), **({"completion": told} if told is not None else {})}


FORMATS: dict[str, Format] = {  # the first whose columns are all there is the one
    "preference": Format(("chosen", "rejected"), '{"prompt": "...", "chosen": "...", "rejected": "..."}', _preference),
    "unpaired-preference": Format(("prompt", "completion", "label"), '{"prompt": "...", "completion": "...", "label": true}', _unpaired),
    "messages": Format(
        ("messages",), '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}', _messages
    ),
    "sharegpt": Format(
        ("conversations",), '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}', _sharegpt
    ),
    "prompt-completion": Format(("prompt", "completion"), '{"prompt": "...", "completion": "..."}', _prompt_completion),
    "alpaca": Format(("instruction", "output"), '{"instruction": "...", "input": "", "output": "..."}', _alpaca),
    "text": Format(("text",), '{"text": "..."}', lambda row: {"text": _text(row.get("text"), "text")}),
    "prompt-only": Format(("prompt",), '{"prompt": "..."}', _prompt_only),
}


def looks_like(row: dict[str, Any]) -> str | None:
    """The format whose columns a row has."""
    return next((name for name, kind in FORMATS.items() if all(column in row for column in kind.columns)), None)


def detect(sample: Iterable[dict[str, Any]], wanted: Iterable[str]) -> tuple[str, str]:
    """(format, reason) of the first rows; `wanted` are the formats that the objective learns from.

    Raises UserError when they are of none or of several formats, or of one that does not fit.
    """
    seen: Counter[str | None] = Counter()
    columns: set[str] = set()
    for row in sample:
        seen[looks_like(row)] += 1
        columns.update(map(str, row))
    known = [name for name in seen if name is not None]
    wanted = tuple(wanted)
    if len(known) > 1:
        counts = ", ".join(f"{count} {name or 'unknown'}" for name, count in seen.items())
        raise UserError(
            "MixedFormats",
            f"the first rows are of several formats ({counts}); split the data set, or set dataset.format and checks.invalidRows: drop",
        )
    if not known:
        shapes = "; ".join(f"{name}: {FORMATS[name].example}" for name in wanted)
        found = ", ".join(sorted(columns)[:20]) or "none"
        raise UserError("UnknownFormat", f"no known format has the columns found ({found}). Expected one of {shapes}")
    if known[0] not in wanted:
        shapes = "; ".join(f"{name}: {FORMATS[name].example}" for name in wanted)
        raise UserError(
            "WrongFormat", f"the rows are of format {known[0]}, which tuning.objective does not learn from. Expected one of {shapes}"
        )
    return known[0], f"rows have {' and '.join(repr(c) for c in FORMATS[known[0]].columns)}"


def strings(row: Shape) -> list[str]:
    """All texts of a row in its common shape that come from the user's data."""
    found: list[str] = []
    for value in row.values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            found += [turn["content"] for turn in value if isinstance(turn, dict) and isinstance(turn.get("content"), str)]
    return found


def system_prompt(row: Shape) -> str:
    """The system prompt of a row, or an empty string."""
    head = next((value for key, value in row.items() if key in ("messages", "prompt") and isinstance(value, list)), None)
    return str(head[0]["content"]) if head and head[0]["role"] == "system" else ""

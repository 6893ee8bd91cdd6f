"""Turns of a conversation, in whichever of the usual spellings they come.

What is read of a turn is taken from it by name; what is left over is reported. So nothing that a turn holds is lost in silence.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from .shape import ROLES, BadRow, Function, Message, Role, ToolCall

Unused = set[str]
"""Paths of keys that hold something and are not read, for example `messages[].score`."""
_PLAIN = {"role", "content"}
_CONVERSATION = {"messages", "parallel_tool_calls"}
"""Keys of OpenAI's `input` of a preference; tools within it are not learned, and so not taken."""
_SAYS, _REASONING, _LEARNED = ("content", "value"), ("reasoning_content", "reasoning", "thinking"), ("weight", "train", "loss")
_NAMES: dict[str, Role | str] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool", "observation": "tool", "function": "tool",
    "tool_response": "tool", "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""Who says a turn, by the names that rows have for it; `call` is ShareGPT's turn of a call."""
_PARTS = {
    "text",
    "input_text",
    "output_text",
    "thinking",
    "reasoning",
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "video",
    "video_url",
    "file",
    "document",
}
"""Types of the parts of a content. A tool's result may be a list of anything else."""
_LOOKS_LIKE_TURNS = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")
_SHOWN = 40
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def text(value: Any, field: str, *, empty: bool = False) -> str:
    """The text of a field. Raises BadRow on anything else, and on none unless `empty` allows it."""
    if value is None:
        raise BadRow(f"{field} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{field} is {type(value).__name__}, expected a string")
    if not value.strip() and not empty:
        raise BadRow(f"{field} is empty")
    if "\x00" in value:
        raise BadRow(f"{field} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{field} holds half of a surrogate pair") from None
    return value


def parse_json(value: str, field: str, expected: str) -> Any:
    """JSON in a text. Raises BadRow."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{field} is text, and no JSON; write {expected}") from None


def as_turns(value: Any, field: str) -> Any:
    """A list of turns where the value is one, also as one turn, within OpenAI's `input`, or as JSON text (CSV files hold lists so); else the value itself."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    if isinstance(value, dict) and isinstance(value.get("messages"), list) and value.keys() <= _CONVERSATION:
        return value["messages"]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, list) and parsed and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in parsed):
        return parsed
    if _LOOKS_LIKE_TURNS.match(value):
        raise BadRow(f"{field} looks like a list of turns, and is no JSON; write it with json.dumps, not with str")
    return value


def turns(value: Any, field: str, unused: Unused) -> list[Message]:
    """A checked list of messages."""
    value = as_turns(value, field)
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise BadRow(f"{field} is text, and no JSON list of turns")
    if not isinstance(value, list) or not value:
        raise BadRow(f"{field} is no list of turns" if value else f"{field} is missing or empty")
    return [_turn(turn, f"{field}[{index}]", unused, field) for index, turn in enumerate(value)]


def _turn(turn: Any, place: str, unused: Unused, field: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {type(turn).__name__}, expected an object with role and content")
    role = turn.get("role")
    if turn.keys() == _PLAIN and role in ROLES and isinstance(said := turn["content"], str) and said:  # nearly every turn
        return {"role": cast(Role, role), "content": text(said, f"{place}.content", empty=role in ("system", "tool"))}
    left = {key: value for key, value in turn.items() if not is_nothing(value)}
    role, key = _role(left, place)
    content = left.pop(key, None)
    if isinstance(content, list) and not (role == "tool" and _is_data(content)):
        content = _joined(content, f"{place}.{key}", left)
    if role == "call":
        role, content = "assistant", _called(content, left, f"{place}.{key}")
    if isinstance(calls := left.get("tool_calls"), str):
        left["tool_calls"] = parse_json(calls, f"{place}.tool_calls", "a list of calls")
    if role == "assistant" and "function_call" in left and "tool_calls" not in left:
        left["tool_calls"] = [{"function": left.pop("function_call")}]
    calls = left.pop("tool_calls", None)
    if calls and role != "assistant":
        raise BadRow(f"{place}.tool_calls stands in a turn of {role}; only the assistant calls tools")
    read: Message = {"role": cast(Role, role), "content": _content(content, role, f"{place}.{key}", said=key in turn, calls=bool(calls))}
    if role == "assistant":
        _assistant(read, left, place)
    if calls:
        read["tool_calls"] = _calls(calls, f"{place}.tool_calls", unused, f"{field}[].tool_calls[]")
    if role == "tool":
        for name in ("name", "tool_call_id"):
            if name in left:
                read[name] = str(left.pop(name))  # type: ignore[literal-required]
    if role != "assistant":  # only answers are learned: said again it is nothing, said otherwise it is reported
        left = {name: value for name, value in left.items() if name not in _LEARNED or _weight(value, f"{place}.{name}")}
    unused.update(f"{field}[].{name}" for name in left)
    return read


def is_nothing(value: Any) -> bool:
    """Whether a value is what Arrow, or a client that writes all its fields, puts where nothing was."""
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, list | dict) and not value)


def _role(left: dict[str, Any], place: str) -> tuple[str, str]:
    """The role, and the key of what is said."""
    key = next((name for name in _SAYS if name in left), "value" if "from" in left else "content")
    if "role" in left:
        said = left.pop("role")
        role = _NAMES.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            raise BadRow(f"{place}: role {str(said)[:_SHOWN]!r} is not one of {', '.join(ROLES)}")
        return role, key
    if "from" not in left:
        raise BadRow(f"{place}: role is missing")
    said = left.pop("from")
    role = _NAMES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{place}: from {str(said)[:_SHOWN]!r} is not one of {', '.join(_NAMES)}")
    return role, key


def _is_data(value: list[Any]) -> bool:
    """Whether a list is a tool's result itself, and no list of the parts of a content."""
    if not value or all(isinstance(part, str) for part in value):
        return bool(value)
    return not any(isinstance(part, dict) and part.get("type") in _PARTS for part in value)


def _joined(parts: list[Any], place: str, left: dict[str, Any]) -> str:
    """Text parts as one text. Thought parts become the turn's reasoning."""
    said: list[str] = []
    for index, part in enumerate(parts):
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else "text"
        kind = "text" if kind in ("input_text", "output_text") else kind  # as the Responses API has them
        value = part if isinstance(part, str) else part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
        if kind in ("thinking", "reasoning") and isinstance(value, str):
            left.setdefault("reasoning_content", value)
        elif kind == "text" and isinstance(value, str):
            said.append(value)
        else:
            shown = str(kind or type(part).__name__)[:_SHOWN]
            raise BadRow(f"{place}[{index}] is a part of type {shown}; only text is learned: write a string, or text parts")
    return "".join(said)


def _content(value: Any, role: str, place: str, *, said: bool, calls: bool) -> str | None:
    if calls and value is None:
        return None
    if role == "tool" and value is not None and not isinstance(value, str):  # a result is often an object or a number
        return text(json.dumps(value, ensure_ascii=False), place)
    if value is None and said and role in ("system", "tool"):
        return ""
    return text(value, place, empty=calls or role in ("system", "tool"))


def _assistant(read: Message, left: dict[str, Any], place: str) -> None:
    name = next((name for name in _REASONING if name in left), None)
    if name is not None:
        thought = text(left.pop(name), f"{place}.{name}", empty=True)
        if thought.strip():
            read["reasoning_content"] = thought
        for other in _REASONING:  # some servers say it under two names
            if left.get(other) == thought:
                del left[other]
    told = [
        _weight(left.pop(name), f"{place}.{name}") for name in _LEARNED if name in left and (name != "loss" or isinstance(left[name], bool))
    ]
    if told and not all(told):
        read["weight"] = 0


def _weight(value: Any, place: str) -> bool:
    """Whether a turn is learned."""
    return truth(value, place, "true or false" if not place.endswith("weight") else "0 (context, not learned) or 1")


def truth(value: Any, place: str, expected: str) -> bool:
    """Yes or no, also as 1 or 0, and as the text of either (CSV files hold those). Raises BadRow."""
    value = _TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRow(
            f"{place} is {str(value)[:_SHOWN]}; write {expected}" if value is not None else f"{place} is missing; write {expected}"
        )
    return bool(value)


def _called(content: Any, left: dict[str, Any], place: str) -> str | None:
    """ShareGPT's turn of a call: its value is the call, or a list of calls, as JSON."""
    found = parse_json(content, place, '{"name": ..., "arguments": {...}}') if isinstance(content, str) else content
    found = found if isinstance(found, list) else [found]
    left["tool_calls"] = found
    return None


def _calls(calls: Any, place: str, unused: Unused, path: str) -> list[ToolCall]:
    if isinstance(calls, list):  # Hermes' spelling has no cover around a call
        calls = [{"function": call} if isinstance(call, dict) and "function" not in call and "name" in call else call for call in calls]
    if not isinstance(calls, list) or not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls):
        raise BadRow(f'{place} is no list of {{"function": {{"name", "arguments"}}}} of the assistant')
    return [_call(call, f"{place}[{index}]", unused, path) for index, call in enumerate(calls)]


def _call(call: dict[str, Any], place: str, unused: Unused, path: str) -> ToolCall:
    function = call["function"]
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise BadRow(f"{place}: function.name is missing")
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{place}.function.arguments", "an object, or JSON text")
        if isinstance(arguments, str):  # written as JSON twice
            arguments = parse_json(arguments, f"{place}.function.arguments", "an object, or JSON text")
    unused.update(
        f"{path}.{key}" for key, value in call.items() if key not in ("id", "type", "function", "index") and not is_nothing(value)
    )
    unused.update(f"{path}.function.{key}" for key, value in function.items() if key not in ("name", "arguments") and not is_nothing(value))
    read: ToolCall = {"type": "function", "function": Function(name=name, arguments={} if arguments is None else arguments)}
    if (identifier := call.get("id")) is not None:
        return {"id": str(identifier), **read}
    return read


def read_tools(value: Any, field: str = "tools") -> list[dict[str, Any]]:
    """Tool definitions, each as {"type": "function", "function": {...}}; an empty list where there are none."""
    if isinstance(value, str):
        value = parse_json(value, field, "a list of tool definitions") if value.strip() else None
    if is_nothing(value):
        return []
    if isinstance(value, list):
        value = [
            parse_json(tool, f"{field}[{index}]", "a tool definition") if isinstance(tool, str) else tool
            for index, tool in enumerate(value)
        ]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{field} is no list of tool definitions")
    read = [tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in value]
    for index, tool in enumerate(read):
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(parameters := function.get("parameters"), str):
            parameters = parse_json(parameters, f"{field}[{index}].function.parameters", "an object")
            function = {**function, "parameters": parameters}
            read[index] = {**tool, "function": function}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(
                f'{field}[{index}] has no function.name; write {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'
            )
    return read


def check_order(messages: list[Message], *, answer: bool = True) -> list[Message]:
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
                "and a tool's result follows the assistant's call"
            )
        if roles[index] == "assistant":
            allowed = ("tool",) if messages[index].get("tool_calls") else ("user", "tool")  # a call may be written out as text
        else:
            allowed = ("assistant", "tool") if roles[index] == "tool" else ("assistant",)
    if len(roles) == first:
        raise BadRow("there is no turn of the user")
    if answer and roles[-1] != "assistant":
        raise BadRow("the last turn is not the assistant's: there is no answer to learn")
    if answer and not any(turn["role"] == "assistant" and "weight" not in turn for turn in messages):
        raise BadRow("every answer has weight 0 (or train false): there is nothing to learn; give one of them weight 1, or remove the row")
    if not answer and roles[-1] == "assistant":
        raise BadRow("the prompt ends with the assistant's turn")
    return messages

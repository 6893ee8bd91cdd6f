"""Whether what a row says stands in the text that a template made of it, in whichever way the template writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .shape import Shape

_WORDS = re.compile(r"\W+")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}", str(key)
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def absent_arguments(turn: Shape, text: str) -> list[str]:
    """Names and values of a turn's calls that do not stand in its text."""
    found = []
    for number, call in enumerate(turn.get("tool_calls") or []):
        arguments = call["function"].get("arguments")
        for path, value in _leaves(arguments, f"tool_calls[{number}].function.arguments"):
            if not stands(value, text):
                found.append(path)
    return list(dict.fromkeys(found))


def schema(function: Shape) -> Iterator[tuple[str, Any]]:
    """What a tool's definition says beside its name: its description, its parameters' names and descriptions."""
    if function.get("description"):
        yield "description", function["description"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for name, told in properties.items() if isinstance(properties, dict) else ():
        yield "parameters", str(name)
        if isinstance(told, dict) and told.get("description"):
            yield "parameters.description", told["description"]


def escaped(text: str) -> tuple[str, str]:
    """A text as JSON writes it."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def stands(value: Any, text: str) -> bool:
    """Whether a value stands in a text, as it is, as JSON or as Python writes it, or at least with its words."""
    if value is None or isinstance(value, bool):
        return any(word in text for word in {None: ("null", "None"), True: ("true", "True"), False: ("false", "False")}[value])
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    core = value.strip()
    if core in text or any(way in text for way in escaped(core)):
        return True
    words = _WORDS.sub("", core)
    return bool(words) and words in _WORDS.sub("", text)


def same_text(found: str, value: str) -> bool:
    """Whether a template wrote a text as it is, but for white space, as JSON, or at least with its words."""
    core = found.strip()
    return core == value or core in escaped(value) or (bool(words := _WORDS.sub("", value)) and words == _WORDS.sub("", core))

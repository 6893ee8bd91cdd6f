"""Nulls that no one wrote: Arrow gives a struct every field that any row has, and fills in null; so do files written from it."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

_LISTS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow's as JSON has it: fields of a struct that are null are not there."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID) else value


def filled_in(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether rows of JSON were written from Arrow: all calls have the same arguments, null where they are those of another tool.

    A null that is a tool's own argument is one that the row says.
    """
    keys: set[frozenset[str]] = set()
    names: set[str] = set()
    others = unknown = False
    for row in rows:
        own = _parameters(row)
        for function in _functions(row):
            name, arguments = function["name"], function["arguments"]
            keys.add(frozenset(arguments))
            names.add(name)
            for key in (key for key, value in arguments.items() if value is None):
                others = others or (name in own and key not in own[name])
                unknown = unknown or name not in own
    return len(keys) == 1 and (others or (unknown and len(names) > 1))


def _parameters(row: dict[str, Any]) -> dict[str, set[str]]:
    """The names of the parameters of each tool that a row defines."""
    tools = row.get("tools") or row.get("functions")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return {}
    found = {}
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(function, dict) and isinstance(properties, dict):
            found[str(function.get("name"))] = {key for key, value in properties.items() if value is not None}
    return found


def _functions(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The calls of a row that are objects with a name and arguments."""
    turns = [turn for name in _LISTS if isinstance(row.get(name), list) for turn in row[name] if isinstance(turn, dict)]
    calls = [call for turn in turns if isinstance(turn.get("tool_calls"), list) for call in turn["tool_calls"] if isinstance(call, dict)]
    for function in [call.get("function", call) for call in calls] + [turn.get("function_call") for turn in turns]:
        if isinstance(function, dict) and isinstance(function.get("name"), str) and isinstance(function.get("arguments"), dict):
            yield function

"""A conversation with markers in place of its texts: where they stand in a rendering tells what the template does with each."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from .shape import Shape

_REASONED = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)", re.DOTALL)


@dataclass(frozen=True)
class Mark:
    """What a marker stands for."""

    index: int
    key: str
    needed: bool


@dataclass
class Probe:
    """A conversation with markers for its texts."""

    turns: list[Shape] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def mark(self, index: int, key: str, value: str, marker: str = "", *, needed: bool = True) -> str:
        """A marker for a text of a turn."""
        marker = marker or f"probe{len(self.markers):04d}q"
        self.markers.append(marker)
        self.marks.append(Mark(index, key, needed))
        self.values.append(value)
        return marker


def _padded(text: str) -> tuple[str, str, str]:
    """(white space, what is said, white space)."""
    lead = len(text) - len(text.lstrip())
    core = text.strip()
    return text[:lead], core, text[lead + len(core) :]


def probed(messages: list[Shape], *, ids: bool = True) -> Probe:
    """The conversation with markers; without `ids`, identifiers stay as they are."""
    probe = Probe()
    known: dict[str, str] = {}

    def marked_id(index: int, key: str, value: Any) -> Any:
        if not ids or not isinstance(value, str) or not value:
            return value
        if value not in known:  # as long, for some templates count: https://github.com/mistralai/mistral-common
            length = max(6, len(value))
            digits = hashlib.sha1(str(len(probe.markers)).encode(), usedforsecurity=False).hexdigest()
            known[value] = probe.mark(index, key, value, (digits * (length // 40 + 1))[:length], needed=False)
        return known[value]

    for index, turn in enumerate(messages):
        told = {key: value for key, value in turn.items() if key != "weight"}
        content, role = turn.get("content"), turn["role"]
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip():
            lead, core, trail = _padded(reasoning)
            told["reasoning_content"] = lead + probe.mark(index, "reasoning_content", core, needed=False) + trail
        if isinstance(content, str) and content.strip():
            if role == "assistant" and "</think>" in content and (parts := _REASONED.fullmatch(content)):
                lead, core, between, answer, trail = parts.groups()
                inner = probe.mark(index, "reasoning_content", core, needed=False) if core else ""
                told["content"] = lead + inner + between + (probe.mark(index, "content", answer) if answer else "") + trail
            elif not (content[0].isspace() or content[-1].isspace()):
                told["content"] = probe.mark(index, "content", content)
            else:
                lead, core, trail = _padded(content)
                told["content"] = lead + probe.mark(index, "content", core) + trail
        if turn.get("tool_calls"):
            told["tool_calls"] = []
            for number, call in enumerate(turn["tool_calls"]):
                function = call["function"]
                name = probe.mark(index, f"tool_calls[{number}]", str(function["name"]))
                new = {**call, "function": {**function, "name": name}}
                if "id" in call:
                    new["id"] = marked_id(index, "tool_calls.id", call["id"])
                told["tool_calls"].append(new)
        if "tool_call_id" in turn:
            told["tool_call_id"] = marked_id(index, "tool_call_id", turn["tool_call_id"])
        probe.turns.append(told)
    return probe


def places_of(text: str, probe: Probe) -> list[tuple[int, int]]:
    """(place, number) of each marker in a text, in order."""
    found = []
    for number, marker in enumerate(probe.markers):
        place = text.find(marker)
        while place >= 0:
            found.append((place, number))
            place = text.find(marker, place + len(marker))
    return sorted(found)


def extent_of(index: int, places: list[tuple[int, int]], probe: Probe) -> tuple[int, int]:
    """From where to where a turn's own texts stand; ids and names are told again with a call's result."""
    first: dict[int, int] = {}
    for place, number in places:
        if probe.marks[number].index == index and not probe.marks[number].key.endswith("id"):
            first.setdefault(number, place)
    return min(first.values(), default=0), max((p + len(probe.markers[n]) for n, p in first.items()), default=0)

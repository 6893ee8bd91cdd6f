"""Render, then verify: a row's text as the model sees it, in which everything that the row says is found again.

A conversation's skeleton is its rendering with a marker in place of each text that the row holds: content, reasoning, a
call's name, an id. What has no marker in the skeleton is left out by the template: the row is refused, or it is told what was lost.
Between the markers stand the template's own words, from which it follows where the assistant's turns begin and end. No
prefix needs to render as a prefix: templates drop earlier reasoning, move the system text, close the last turn otherwise.
Rows of one shape share a skeleton, so a row costs one rendering and one comparison.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from .chat_template import ChatTemplate, Form, forms_for, shared_prefix
from .shape import BadRow, Shape
from .verification import absent_arguments, escaped, same_text, schema, stands

NOT_RENDERED = "notRendered"
"""What a row is noted with whose key the template leaves out."""
_MOST_SKELETONS = 2_000
_REASONED = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)", re.DOTALL)
_PADDED = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """Where one of the assistant's turns stands in the text, its end token included where the model stops with it."""

    index: int
    start: int
    end: int
    learned: bool
    token: str
    """The end token, or nothing."""


@dataclass(frozen=True)
class Rendered:
    """A row as the model sees it."""

    text: str
    turns: tuple[Turn, ...]
    lost: tuple[str, ...]
    """Keys whose value the template leaves out, though the row may be learned without."""
    form: Form
    """How the turns were given to the template."""


class Unaligned(BadRow):
    """A row whose turns cannot be told apart in the text."""


@dataclass(frozen=True)
class _Mark:
    """What a marker stands for."""

    index: int
    key: str
    needed: bool


@dataclass
class _Probe:
    """A conversation with markers for its texts."""

    turns: list[Shape] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    marks: list[_Mark] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def mark(self, index: int, key: str, value: str, marker: str = "", *, needed: bool = True) -> str:
        marker = marker or f"probe{len(self.markers):04d}q"
        self.markers.append(marker)
        self.marks.append(_Mark(index, key, needed))
        self.values.append(value)
        return marker


@dataclass(frozen=True)
class _Edge:
    """A place in a skeleton: so many characters into the template's words before the marker of this number."""

    frame: int
    offset: int


@dataclass(frozen=True)
class _Skeleton:
    form: Form
    frames: tuple[str, ...]
    """The template's words: before, between and behind the markers."""
    order: tuple[int, ...]
    """The markers' numbers as they stand in the text."""
    turns: tuple[tuple[int, _Edge, _Edge, int, str], ...]
    """Each turn of the assistant: message, begin, end, characters of its end token, text to put behind it."""
    missing: tuple[str, ...]
    lost: tuple[str, ...]
    silent: frozenset[int]
    """Turns whose reasoning is left out: learning them would teach to answer without it."""

    @property
    def losses(self) -> tuple[int, bool, int]:
        """How much is left out, what matters most first."""
        return len(self.missing), "tools" in self.lost, len(self.silent)

    def fill(self, values: list[str]) -> str:
        parts = [self.frames[0]]
        for number, frame in zip(self.order, self.frames[1:], strict=True):
            parts += (values[number], frame)
        return "".join(parts)


class Renderer:
    """Renders conversations with one tokenizer's chat template, and verifies what it made."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._skeletons: dict[str, _Skeleton] = {}
        self._usual: dict[tuple[Any, ...], tuple[Form, tuple[str, ...]]] = {}
        self._bare: str | None = None
        self._notes: set[str] = set()

    def take_notes(self) -> tuple[str, ...]:
        """What became of rows' keys since this was asked last, where they do not stand in the text as they do in the row."""
        notes, self._notes = tuple(sorted(self._notes)), set()
        return notes

    def row(self, messages: list[Shape], tools: list[Shape] | None = None) -> Rendered:
        """The text of a conversation, and where the assistant's turns stand in it. Raises BadRow for what does not reach the text."""
        probe = _probe(messages)
        key = repr((probe.turns, tools))
        skeleton = self._skeletons.get(key)
        known = skeleton is not None
        if skeleton is None:
            skeleton = self._remember(key, self._find(probe, tools))
        untold = list(skeleton.missing)
        if skeleton.silent and not any(is_learned(messages[t[0]]) and t[0] not in skeleton.silent for t in skeleton.turns):
            untold += [f"messages[{index}].reasoning_content" for index in sorted(skeleton.silent)]
        if untold:
            raise BadRow(
                f"the model's chat template leaves out {', '.join(untold[:5])}: use a model whose template knows it, set "
                "tuning.chatTemplate, or take it out of the row"
            )
        try:
            return self._fit(skeleton, probe, messages, tools)
        except Unaligned:
            if not known:
                raise
        return self._fit(self._remember(key, self._find(probe, tools)), probe, messages, tools)  # a template that writes the date

    def text(self, messages: list[Shape], tools: list[Shape] | None = None) -> str:
        """The text of a conversation that is learned as a whole: its turns need not be told apart."""
        try:
            return self.row(messages, tools).text
        except Unaligned:
            text, probe = self.template.render(messages, tools), _probe(messages)
            for mark, value in zip(probe.marks, probe.values, strict=True):
                if mark.needed and not stands(value, text):
                    raise
            return text

    def _remember(self, key: str, skeleton: _Skeleton) -> _Skeleton:
        if len(self._skeletons) >= _MOST_SKELETONS:
            self._skeletons.clear()
        self._skeletons[key] = skeleton
        return skeleton

    # --- a row in its skeleton

    def _fit(self, skeleton: _Skeleton, probe: _Probe, messages: list[Shape], tools: list[Shape] | None) -> Rendered:
        text = self.template.render(messages, tools, form=skeleton.form)
        values, expected = probe.values, skeleton.fill(probe.values)
        if skeleton.form.served:
            asked = self.template.render(messages[:-1], tools, form=skeleton.form, prompt=True)
            if not (expected.startswith(asked) and text.endswith(expected[len(asked) :])):
                raise Unaligned(_UNTOLD)
            text = expected
        if text != expected:
            values = self._regions(skeleton, probe, text)
        starts = [0]
        for number, frame in zip(skeleton.order, skeleton.frames, strict=False):
            starts.append(starts[-1] + len(frame) + len(values[number]))
        turns, behind = [], ""
        for index, begin, end, closing, behind in skeleton.turns:
            start, stop = starts[begin.frame] + begin.offset, starts[end.frame] + end.offset
            learned = is_learned(messages[index]) and index not in skeleton.silent
            if learned and not text[start : stop - closing].strip():
                raise BadRow(f"messages[{index}] has nothing to learn but its end in the text that the chat template makes")
            turns.append(Turn(index, start, stop + len(behind), learned, behind or text[stop - closing : stop]))
        if behind:  # a template that closes no turn
            text = text[: turns[-1].end - len(behind)] + behind
        self._notes.update(f"{NOT_RENDERED} {key}" for key in skeleton.lost)
        self._notes.update(skeleton.form.notes)
        return Rendered(text, tuple(turns), skeleton.lost, skeleton.form)

    @staticmethod
    def _regions(skeleton: _Skeleton, probe: _Probe, text: str) -> list[str]:
        """What stands in place of each marker, where the template writes a text in another way."""
        values, place = list(probe.values), len(skeleton.frames[0])
        if not text.startswith(skeleton.frames[0]):
            raise Unaligned(_UNTOLD)
        last = len(skeleton.order) - 1
        for turn, number in enumerate(skeleton.order):
            frame, value = skeleton.frames[turn + 1], probe.values[number]
            ways = [value, *escaped(value)]
            end = next((place + len(w) for w in ways if text.startswith(w, place) and text.startswith(frame, place + len(w))), -1)
            if end < 0 or (turn == last and end + len(frame) != len(text)):
                end = len(text) - len(frame) if turn == last else text.find(frame, place) if frame else -1
            found = text[place:end]
            if end < place or not text.endswith(frame, place, end + len(frame)):
                raise Unaligned(_UNTOLD)
            if not same_text(found, value):
                mark = probe.marks[number]
                raise Unaligned(
                    f"the model's chat template changes messages[{mark.index}].{mark.key}: {value[:40]!r} became {found[:40]!r}"
                )
            values[number], place = found, end + len(frame)
        return values

    # --- the skeleton of a kind of rows

    def _find(self, probe: _Probe, tools: list[Shape] | None) -> _Skeleton:
        """The skeleton in the first form that loses nothing, else in the one that loses least."""
        kind = (
            bool(tools),
            *sorted({(t["role"], bool(t.get("content")), "tool_calls" in t, "reasoning_content" in t) for t in probe.turns}),
        )
        usual = self._usual.get(kind)
        best: _Skeleton | None = None
        failure: BadRow | None = None
        forms = forms_for(probe.turns, inline=not self.template.knows_reasoning)
        for form in ([usual[0]] if usual else []) + [form for form in forms if not usual or form != usual[0]]:
            try:
                found = self._skeleton(form, probe, tools)
            except BadRow as problem:
                failure = failure or problem
                continue
            if best is None or found.losses < best.losses:
                best = found
            if not any(found.losses) or (not found.missing and usual == (form, found.lost)):
                break
        if best is None:
            raise failure or BadRow("the chat template makes no text of the row")
        if not best.missing:
            self._usual[kind] = (best.form, best.lost)
        return best

    def _skeleton(self, form: Form, probe: _Probe, tools: list[Shape] | None) -> _Skeleton:
        text = self.template.render(probe.turns, tools, form=form)
        begins: dict[int, int] = {}
        if form.served:
            if probe.turns[-1]["role"] != "assistant" or len(probe.turns) < 2:
                raise BadRow(_UNTOLD)
            last = len(probe.turns) - 1
            asked = self.template.render(probe.turns[:-1], tools, form=form, prompt=True)
            text = asked + text[self._begin(last, text, _places(text, probe), probe, tools, form) :]
            begins[last] = len(asked)
        places = _places(text, probe)
        there = {number for _, number in places}
        missing: list[str] = []
        lost: list[str] = []
        silent: set[int] = set()
        for number, mark in enumerate(probe.marks):
            if number not in there:
                (missing if mark.needed else lost).append(f"messages[{mark.index}].{mark.key}" if mark.needed else mark.key)
                if mark.key == "reasoning_content":
                    silent.add(mark.index)
        edges: list[tuple[int, _Edge, _Edge, int, str]] = []
        outside, after = [], 0
        for index, turn in enumerate(probe.turns):
            if turn["role"] != "assistant" or not _extent(index, places, probe)[1]:
                continue
            begin = begins[index] if index in begins else self._begin(index, text, places, probe, tools, form)
            end, closing, behind = self._end(index, text, places, probe, tools, form)
            missing += [f"messages[{index}].{m}" for m in absent_arguments(turn, text[begin:end])]
            edges.append((index, _edge(begin, places, probe), _edge(end, places, probe), closing, behind))
            outside.append(text[after:begin])
            after = end
        outside.append(text[after:])
        if tools:
            absent, untold = self._absent_tools(tools, "\n".join(outside))
            if absent and any(mark.key.startswith("tool_calls[") for n, mark in enumerate(probe.marks) if n in there):
                absent, untold = [], ["tools"]  # the calls are there: they can be learned without being told what there is
            missing, lost = missing + absent, lost + untold
        frames, after = [], 0
        for place, number in places:
            frames.append(text[after:place])
            after = place + len(probe.markers[number])
        return _Skeleton(
            form,
            (*frames, text[after:]),
            tuple(number for _, number in places),
            tuple(edges),
            tuple(missing),
            tuple(sorted(set(lost))),
            frozenset(silent),
        )

    def _begin(self, index: int, text: str, places: list[tuple[int, int]], probe: _Probe, tools: Any, form: Form) -> int:
        """Where a turn of the assistant begins: behind the words with which the model is asked for it, as far as they stand there."""
        first, _ = _extent(index, places, probe)
        if index == 0:
            return first
        asked = self.template.render(probe.turns[:index], tools, form=form, prompt=True)
        if text.startswith(asked) and len(asked) <= first:
            return len(asked)
        before = max((p + len(probe.markers[n]) for p, n in places if p < first), default=0)
        words = asked[max((p + len(probe.markers[n]) for p, n in _places(asked, probe)), default=0) :]
        shared = self.template.whole_tokens(text[before:first], len(shared_prefix(text[before:first], words)))
        return before + shared if shared else first

    def _end(self, index: int, text: str, places: list[tuple[int, int]], probe: _Probe, tools: Any, form: Form) -> tuple[int, int, str]:
        """(where a turn of the assistant ends, characters of its end token, what is to be put behind the text).

        An end token that the model does not stop with (gpt-oss closes earlier turns with another) is left out.
        """
        _, last = _extent(index, places, probe)
        following = min((p for p, n in places if p >= last and probe.marks[n].index != index), default=len(text))
        end = self.template.turn_end
        if (place := text.find(end, last, following)) >= 0:
            return place + len(end), len(end), ""
        if probe.turns[index].get("tool_calls"):
            alone = self.template.render(probe.turns[: index + 1], tools, form=form)
            token = self.template.last_token(alone, _extent(index, _places(alone, probe), probe)[1])
            if token is not None and (place := text.find(token, last, following)) >= 0:
                return place + len(token), len(token), ""
        if (found := self.template.next_token(text, last, following)) is not None:
            return found[0], 0, ""
        if following == len(text):
            return last + len(text[last:].rstrip()), 0, end
        return last, 0, ""

    def _absent_tools(self, tools: list[Shape], words: str) -> tuple[list[str], list[str]]:
        """Tools whose name is not told to the model, and what else of their schema is not."""
        if self._bare is None:
            self._bare = self.template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        missing: list[str] = []
        lost: list[str] = []
        for tool in tools:
            function: Shape = inner if isinstance(inner := tool.get("function"), dict) else tool
            name = str(function.get("name") or "")
            if words.count(name) <= self._bare.count(name):
                missing.append(f"tools: {name!r}")
            lost += [f"tools.{key}" for key, told in schema(function) if not stands(told, words)]
        return missing, lost


_UNTOLD = (
    "the model's chat template does not keep the turns apart, so the assistant's tokens cannot be told; set another "
    "tuning.chatTemplate, or tuning.assistantOnlyLoss: false, or give the row as prompt-completion"
)


def is_learned(turn: Shape) -> bool:
    """Whether a turn of the assistant is learned: one of weight 0 is context."""
    return turn.get("weight") != 0


def _probe(messages: list[Shape]) -> _Probe:
    probe = _Probe()
    ids: dict[str, str] = {}

    def marked_id(index: int, key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        if value not in ids:  # as long, for some templates count: https://github.com/mistralai/mistral-common
            length = max(6, len(value))
            digits = hashlib.sha1(str(len(probe.markers)).encode(), usedforsecurity=False).hexdigest()
            ids[value] = probe.mark(index, key, value, (digits * (length // 40 + 1))[:length], needed=False)
        return ids[value]

    for index, turn in enumerate(messages):
        told = {key: value for key, value in turn.items() if key != "weight"}
        content, role = turn.get("content"), turn["role"]
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip():
            lead, core, trail = _PADDED.fullmatch(reasoning).groups()  # type: ignore[union-attr]
            told["reasoning_content"] = lead + probe.mark(index, "reasoning_content", core, needed=False) + trail
        if isinstance(content, str) and content.strip():
            if role == "assistant" and "</think>" in content and (parts := _REASONED.fullmatch(content)):
                lead, core, between, answer, trail = parts.groups()
                inner = probe.mark(index, "reasoning_content", core, needed=False) if core else ""
                told["content"] = lead + inner + between + (probe.mark(index, "content", answer) if answer else "") + trail
            elif not (content[0].isspace() or content[-1].isspace()):
                told["content"] = probe.mark(index, "content", content)
            else:
                lead, core, trail = _PADDED.fullmatch(content).groups()  # type: ignore[union-attr]
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


def _places(text: str, probe: _Probe) -> list[tuple[int, int]]:
    """(place, number) of each marker in a text, in order."""
    found = []
    for number, marker in enumerate(probe.markers):
        place = text.find(marker)
        while place >= 0:
            found.append((place, number))
            place = text.find(marker, place + len(marker))
    return sorted(found)


def _extent(index: int, places: list[tuple[int, int]], probe: _Probe) -> tuple[int, int]:
    """From where to where a turn's own texts stand; ids and names are told again with a call's result."""
    first: dict[int, int] = {}
    for place, number in places:
        if probe.marks[number].index == index and not probe.marks[number].key.endswith("id"):
            first.setdefault(number, place)
    return min(first.values(), default=0), max((p + len(probe.markers[n]) for n, p in first.items()), default=0)


def _edge(place: int, places: list[tuple[int, int]], probe: _Probe) -> _Edge:
    """A place of a skeleton's text, by the template's words that it stands in."""
    frame, begin = 0, 0
    for where, number in places:
        if where >= place:
            break
        frame, begin = frame + 1, where + len(probe.markers[number])
    return _Edge(frame, place - begin)

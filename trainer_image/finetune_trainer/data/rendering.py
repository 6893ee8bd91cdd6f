"""Render, then verify: a row's text as the model sees it, in which everything that the row says is found again.

A conversation's skeleton is its rendering with a marker in place of each text that the row holds: content, reasoning, a
call's name, an id. What has no marker in the skeleton is left out by the template: the row is refused, or it is told what was lost.
Between the markers stand the template's own words, from which it follows where the assistant's turns begin and end. No
prefix needs to render as a prefix: templates drop earlier reasoning, move the system text, close the last turn otherwise.
Rows of one shape share a skeleton, so a row costs one rendering and one comparison.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .chat_template import ChatTemplate, Form, forms_for
from .markers import Probe, extent_of, places_of, probed
from .shape import BadRow, Shape
from .verification import absent_arguments, escaped, same_text, schema, stands

NOT_RENDERED = "notRendered"
"""What a row is noted with whose key the template leaves out."""
CHANGED = "changed"
"""What a row is noted with whose key the template writes with other white space or punctuation."""
_MOST_SKELETONS, _TRIED_IN_FULL = 500, 20


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
        self._skeletons: dict[bytes, _Skeleton] = {}
        self._usual: dict[tuple[Any, ...], tuple[Form, tuple[bool, ...]]] = {}
        self._refused: Counter[tuple[Any, ...]] = Counter()
        self._bare: str | None = None
        self._notes: set[str] = set()

    def take_notes(self) -> tuple[str, ...]:
        """What became of rows' keys since this was asked last, where they do not stand in the text as they do in the row."""
        notes, self._notes = tuple(sorted(self._notes)), set()
        return notes

    def row(self, messages: list[Shape], tools: list[Shape] | None = None) -> Rendered:
        """The text of a conversation, and where the assistant's turns stand in it. Raises BadRow for what does not reach the text."""
        probe = probed(messages)
        key, skeleton = self._known(probe, tools)
        self._check(skeleton, messages)
        try:
            return self._fit(skeleton, probe, messages, tools)
        except Unaligned as failure:  # a template that writes the date, or a part of an id
            again = probed(messages, ids=False)
            try:
                fresh = self._find(again, tools)
                self._check(fresh, messages)
                rendered = self._fit(fresh, again, messages, tools)
            except BadRow:
                raise failure from None
            self._skeletons.pop(key)
            return rendered

    def silent(self, messages: list[Shape], tools: list[Shape] | None = None) -> frozenset[int]:
        """Turns of the assistant whose reasoning the template leaves out. Raises BadRow."""
        return self._known(probed(messages), tools)[1].silent

    def _known(self, probe: Probe, tools: list[Shape] | None) -> tuple[bytes, _Skeleton]:
        key = hashlib.blake2b(repr((probe.turns, tools)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._find(probe, tools)
        return key, self._skeletons[key]

    @staticmethod
    def _check(skeleton: _Skeleton, messages: list[Shape]) -> None:
        untold = list(skeleton.missing)
        if skeleton.silent and not any(is_learned(messages[t[0]]) and t[0] not in skeleton.silent for t in skeleton.turns):
            untold += [f"messages[{index}].reasoning_content" for index in sorted(skeleton.silent)]
        if untold:
            raise BadRow(
                f"the model's chat template leaves out {', '.join(untold[:5])}: use a model whose template knows it, set "
                "tuning.chatTemplate, or take it out of the row"
            )

    def text(self, messages: list[Shape], tools: list[Shape] | None = None) -> str:
        """The text of a conversation that is learned as a whole: its turns need not be told apart."""
        try:
            return self.row(messages, tools).text
        except Unaligned:
            text, probe = self.template.render(messages, tools), probed(messages)
            for mark, value in zip(probe.marks, probe.values, strict=True):
                if mark.needed and not stands(value, text):
                    raise
            return text

    # --- a row in its skeleton

    def _fit(self, skeleton: _Skeleton, probe: Probe, messages: list[Shape], tools: list[Shape] | None) -> Rendered:
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

    def _regions(self, skeleton: _Skeleton, probe: Probe, text: str) -> list[str]:
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
            if found.strip() not in ways:
                self._notes.add(f"{CHANGED} {probe.marks[number].key}")
            values[number], place = found, end + len(frame)
        return values

    # --- the skeleton of a kind of rows

    def _find(self, probe: Probe, tools: list[Shape] | None) -> _Skeleton:
        """The skeleton in the first form that loses nothing, else in the one that loses least."""
        kind = (
            bool(tools),
            *sorted({(t["role"], bool(t.get("content")), "tool_calls" in t, "reasoning_content" in t) for t in probe.turns}),
        )
        usual, least = self._usual.get(kind, (None, None))
        best: _Skeleton | None = None
        failure: BadRow | None = None
        forms = forms_for(probe.turns, inline=not self.template.knows_reasoning)
        if usual is None and self._refused[kind] > _TRIED_IN_FULL:
            forms = forms[:1]
        for form in ([usual] if usual is not None else []) + [form for form in forms if form != usual]:
            try:
                found = self._skeleton(form, probe, tools)
            except BadRow as problem:
                failure = failure or problem
                continue
            if best is None or found.losses < best.losses:
                best = found
            if not any(found.losses) or (form == usual and tuple(map(bool, found.losses)) == least):
                break
        if best is None:
            self._refused[kind] += 1
            raise failure or BadRow("the chat template makes no text of the row")
        self._usual[kind] = best.form, tuple(map(bool, best.losses))
        return best

    def _skeleton(self, form: Form, probe: Probe, tools: list[Shape] | None) -> _Skeleton:
        text = self.template.render(probe.turns, tools, form=form)
        begins: dict[int, int] = {}
        if form.served:
            if probe.turns[-1]["role"] != "assistant" or len(probe.turns) < 2:
                raise BadRow(_UNTOLD)
            last = len(probe.turns) - 1
            asked = self.template.render(probe.turns[:-1], tools, form=form, prompt=True)
            text = asked + text[self._begin(last, text, places_of(text, probe), probe, tools, form) :]
            begins[last] = len(asked)
        places = places_of(text, probe)
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
            if turn["role"] != "assistant" or not extent_of(index, places, probe)[1]:
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

    def _begin(self, index: int, text: str, places: list[tuple[int, int]], probe: Probe, tools: Any, form: Form) -> int:
        """Where a turn of the assistant begins: behind the words with which the model is asked for it, as far as they stand there."""
        first, _ = extent_of(index, places, probe)
        if index == 0:
            return first
        asked = self.template.render(probe.turns[:index], tools, form=form, prompt=True)
        if text.startswith(asked) and len(asked) <= first:
            return len(asked)
        before = max((p + len(probe.markers[n]) for p, n in places if p < first), default=0)
        words = asked[max((p + len(probe.markers[n]) for p, n in places_of(asked, probe)), default=0) :]
        alike = os.path.commonprefix([text[before:first], words])  # noqa: RUF071 - no paths
        shared = self.template.whole_tokens(text[before:first], len(alike))
        return before + shared if shared else first

    def _end(self, index: int, text: str, places: list[tuple[int, int]], probe: Probe, tools: Any, form: Form) -> tuple[int, int, str]:
        """(where a turn of the assistant ends, characters of its end token, what is to be put behind the text).

        An end token that the model does not stop with (gpt-oss closes earlier turns with another) is left out.
        """
        _, last = extent_of(index, places, probe)
        following = min((p for p, n in places if p >= last and probe.marks[n].index != index), default=len(text))
        end = self.template.turn_end
        if (place := text.find(end, last, following)) >= 0:
            return place + len(end), len(end), ""
        if probe.turns[index].get("tool_calls"):
            alone = self.template.render(probe.turns[: index + 1], tools, form=form)
            token = self.template.last_token(alone, extent_of(index, places_of(alone, probe), probe)[1])
            if token is not None and (place := text.find(token, last, following)) >= 0:
                return self._end_of_call(index, text, place, token, probe, tools, form)
        if (found := self.template.next_token(text, last, following)) is not None:
            return found[0], 0, ""
        if following == len(text):
            return last + len(text[last:].rstrip()), 0, end
        return last, 0, ""

    def _end_of_call(self, index: int, text: str, place: int, token: str, probe: Probe, tools: Any, form: Form) -> tuple[int, int, str]:
        """The end of a turn that calls: its own last token, or, of a template that closes no turn (GLM), what opens the result."""
        stop = place + len(token)
        if not self.template.closes_turns:
            result = {"role": "tool", "content": "result"}
            answered = self.template.render([*probe.turns[: index + 1], result], tools, form=form)
            _, _, behind = answered.partition(text[:stop])
            opened = self.template.next_token(behind)
            if opened is not None and not behind[: opened[0]].strip():
                after = text.find(opened[1], stop)
                if not text[stop:].strip():
                    return stop, 0, opened[1]
                if after >= 0 and not text[stop:after].strip():
                    return after + len(opened[1]), len(opened[1]), ""
        return stop, len(token), ""

    def _absent_tools(self, tools: list[Shape], words: str) -> tuple[list[str], list[str]]:
        """Tools whose name is not told to the model, and what else of their schema is not."""
        if self._bare is None:
            try:
                self._bare = self.template.render([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
            except BadRow:
                self._bare = ""
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


def _edge(place: int, places: list[tuple[int, int]], probe: Probe) -> _Edge:
    """A place of a skeleton's text, by the template's words that it stands in."""
    frame, begin = 0, 0
    for where, number in places:
        if where >= place:
            break
        frame, begin = frame + 1, where + len(probe.markers[number])
    return _Edge(frame, place - begin)

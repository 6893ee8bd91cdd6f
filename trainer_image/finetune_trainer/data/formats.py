"""The formats of a row: how each is recognised, what is read of it, and what is wrong with a row.

A format is added as one entry of FORMATS: its columns, an example for messages to people, and a function to its shape (shape.py).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..process.errors import UserError
from .nulls import without_nulls
from .shape import BadRow, Message, Shape, is_conversation
from .turns import Unused, as_turns, check_order, is_nothing, parse_json, read_tools, text, truth, turns

Values = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One format of rows."""

    columns: tuple[str, ...]
    """Columns that a row of it has; with these it is recognised."""
    example: str
    """What a row looks like, for messages."""
    read: Callable[[Values, Unused], Shape]
    more: tuple[str, ...] = ()
    """Columns that are read beside those, where a row has them."""

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """Every column that is read."""
        return frozenset((*self.columns, *self.more))

    def normalize(self, row: Values, unused: Unused | None = None) -> Shape:
        """The row in its common shape; paths of keys that hold something and were not read go into `unused`. Raises BadRow."""
        left: Unused = set() if unused is None else unused
        for key in row.keys() - self.known:
            if not is_nothing(row[key]) and row[key] != "":
                left.add(str(key))
        return self.read(row, left)


def _column(row: Values, field: str, *, empty: bool = False) -> str:
    """The text of a column. A number stands for its digits: CSV and Parquet files keep columns of them."""
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    return text(value, field, empty=empty)


def _optional(row: Values, field: str) -> str:
    """The text of a column that a row may lack: empty where it has none."""
    value = row.get(field)
    return "" if is_nothing(value) else _column(row, field, empty=True)


def _head(row: Values, messages: list[Message]) -> list[Message]:
    """The turns, with the text of column `system` in front."""
    system = _optional(row, "system")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] not in ("", system):
            raise BadRow("the column system and the system turn differ; keep one of them")
        messages = messages[1:]
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Values) -> Shape:
    tools = read_tools(row.get("tools")) or read_tools(row.get("functions"), "functions")  # the older spelling
    return {"tools": tools} if tools else {}


def _is_chat(row: Values, *fields: str) -> bool:
    """Whether a row of columns is a conversation: one of them holds turns, or there is a system text or a tool, which text has no place for."""
    if "system" in row or _tools(row):
        return True
    return any(isinstance(as_turns(row.get(field), field), list) for field in fields)


def _side(row: Values, field: str, role: str, unused: Unused) -> list[Message]:
    """A column as turns: the turns that it holds, or its text as one of `role`."""
    value = as_turns(row.get(field), field)
    if isinstance(value, list):
        return turns(value, field, unused)
    return [{"role": role, "content": _column(row, field)}]  # type: ignore[typeddict-item]


def _messages(row: Values, unused: Unused) -> Shape:
    return {"messages": check_order(_head(row, turns(row.get("messages"), "messages", unused))), **_tools(row)}


def _prompt_completion(row: Values, unused: Unused) -> Shape:
    if not _is_chat(row, "prompt", "completion"):
        return {"prompt": _column(row, "prompt"), "completion": _column(row, "completion")}
    both = [*_side(row, "prompt", "user", unused), *_side(row, "completion", "assistant", unused)]
    return {"messages": check_order(_head(row, both)), **_tools(row)}


def _alpaca(row: Values, unused: Unused) -> Shape:
    extra = _optional(row, "input")
    question = _column(row, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
    before: list[Message] = []
    history = row.get("history") or []
    history = parse_json(history, "history", "a list of pairs") if isinstance(history, str) else history
    if not isinstance(history, list):
        raise BadRow(f"history is {type(history).__name__}, expected a list of pairs of a question and an answer")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{index}] is no pair of a question and an answer")
        before.append({"role": "user", "content": text(pair[0], f"history[{index}][0]")})
        before.append({"role": "assistant", "content": text(pair[1], f"history[{index}][1]")})
    said: list[Message] = [*before, {"role": "user", "content": question}, {"role": "assistant", "content": _column(row, "output")}]
    return {"messages": check_order(_head(row, said)), **_tools(row)}


def _sharegpt(row: Values, unused: Unused) -> Shape:
    return {"messages": check_order(_head(row, turns(row.get("conversations"), "conversations", unused))), **_tools(row)}


_HUMAN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")


def _dialog(row: Values, field: str) -> list[Message]:
    """Anthropic's form of a conversation as one text: paragraphs that begin with `Human:` and `Assistant:`."""
    _, *pieces = _HUMAN.split(_column(row, field))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]  # type: ignore[typeddict-item]


_NO_PROMPT = "prompt is missing, and chosen and rejected are answers alone; give the question as prompt, or name yours in dataset.columns"


def _preference(row: Values, unused: Unused) -> Shape:
    if row.get("prompt") is None and all(isinstance(row.get(side), str) and _HUMAN.match(row[side]) for side in ("chosen", "rejected")):
        shape = _conversations(row, _dialog(row, "chosen"), _dialog(row, "rejected"), unused)
    elif _is_chat(row, "prompt", "chosen", "rejected"):
        shape = _conversations(row, _side(row, "chosen", "assistant", unused), _side(row, "rejected", "assistant", unused), unused)
    elif row.get("prompt") is None:
        raise BadRow(_NO_PROMPT)
    else:
        shape = {field: _column(row, field) for field in ("prompt", "chosen", "rejected")}
    if shape["chosen"] == shape["rejected"]:
        raise BadRow("chosen and rejected are the same: there is nothing to prefer")
    return shape


def _conversations(row: Values, good: list[Message], bad: list[Message], unused: Unused) -> Shape:
    head: list[Message] = []
    if good[0]["role"] != "assistant" and bad[0]["role"] != "assistant":  # whole conversations: what they share is the prompt
        while len(head) < min(len(good), len(bad)) - 1 and good[len(head)] == bad[len(head)]:
            head.append(good[len(head)])
        good, bad = good[len(head) :], bad[len(head) :]
        if not head:
            raise BadRow("chosen and rejected share no prompt")
    if row.get("prompt") is not None:
        prompt = _side(row, "prompt", "user", unused)
        if head and not any(_said(prompt) == _said(head[start : start + len(prompt)]) for start in range(len(head))):
            raise BadRow("chosen and rejected begin with another prompt than the column prompt; give answers alone, or remove prompt")
        head = head or prompt
    elif not head:
        raise BadRow(_NO_PROMPT)
    head = _head(row, head)
    for field, answer in (("chosen", good), ("rejected", bad)):
        try:
            check_order([*head, *answer])
        except BadRow as failure:
            raise BadRow(f"{field}: {failure}") from None
    return {"prompt": head, "chosen": good, "rejected": bad, **_tools(row)}


def _said(messages: list[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], (turn["content"] or "").strip()) for turn in messages]


def _unpaired(row: Values, unused: Unused) -> Shape:
    label = truth(row.get("label"), "label", "true (a good answer) or false, also as 1 or 0")
    return {**_prompt_completion(row, unused), "label": label}


def _prompt_only(row: Values, unused: Unused) -> Shape:
    """A prompt, with the answer that rewards compare with where the row has one: as `answer`, or else as `solution`."""
    field = next((name for name in ("answer", "solution") if row.get(name) not in (None, "")), None)
    if field == "answer" and row.get("solution") not in (None, ""):
        unused.add("solution")
    answer = _column(row, field) if field is not None else None
    if not _is_chat(row, "prompt"):
        prompt = _column(row, "prompt")
        return {"prompt": prompt} if answer is None else {"prompt": prompt, "completion": answer}
    messages = check_order(_head(row, _side(row, "prompt", "user", unused)), answer=False)
    told: list[Message] = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [*messages, *told], **_tools(row)}


_AROUND = ("system", "tools", "functions")
FORMATS: dict[str, Format] = {  # the first whose columns are all there is the one
    "preference": Format(
        ("chosen", "rejected"), '{"prompt": "...", "chosen": "...", "rejected": "..."}', _preference, ("prompt", *_AROUND)
    ),
    "unpaired-preference": Format(
        ("prompt", "completion", "label"), '{"prompt": "...", "completion": "...", "label": true}', _unpaired, _AROUND
    ),
    "messages": Format(
        ("messages",), '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}', _messages, _AROUND
    ),
    "sharegpt": Format(
        ("conversations",), '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}', _sharegpt, _AROUND
    ),
    "prompt-completion": Format(("prompt", "completion"), '{"prompt": "...", "completion": "..."}', _prompt_completion, _AROUND),
    "alpaca": Format(
        ("instruction", "output"), '{"instruction": "...", "input": "", "output": "..."}', _alpaca, ("input", "history", *_AROUND)
    ),
    "text": Format(("text",), '{"text": "..."}', lambda row, _: {"text": _column(row, "text")}),
    "prompt-only": Format(("prompt",), '{"prompt": "..."}', _prompt_only, ("answer", "solution", *_AROUND)),
}


@dataclass(frozen=True)
class RowReader:
    """How the rows of one source are read: their format, and what the user calls its columns."""

    format: str
    columns: Mapping[str, str]
    """The user's name of a column -> the format's."""
    chat: bool = False
    """Whether rows are conversations, also those that could be plain text: some of the source have a system text."""
    filled: bool = False
    """Whether nulls stand where a row had nothing (nulls.py)."""

    def read(self, value: Values, unused: Unused | None = None) -> tuple[Shape, Unused]:
        """The row in its common shape, and the paths of what is not read of it, also in `unused`. Raises BadRow."""
        left: Unused = set() if unused is None else unused
        row = rename(without_nulls(value) if self.filled else value, self.columns, left)
        return FORMATS[self.format].normalize({"system": None, **row} if self.chat else row, left), left

    def reads_conversation(self, values: Iterable[Values]) -> bool:
        """Whether one of some rows is a conversation, which needs a chat template."""
        for value in values:
            try:
                shape, _ = self.read(value)
            except BadRow:
                continue
            if is_conversation(shape):
                return True
        return False


def rename(row: Values, columns: Mapping[str, str], unused: Unused | None = None) -> Values:
    """A row with the format's names of its columns. What the user's map displaces, or names twice, counts as not read."""
    if not columns:
        return row
    mapped: Values = {}
    lost: Unused = set()
    for key, name in columns.items():
        if row.get(key) is not None:
            lost.update([key] if name in mapped else [])
            mapped.setdefault(name, row[key])
    rest = {key: value for key, value in row.items() if key not in columns}
    lost.update(name for name in mapped if rest.get(name) not in (None, ""))
    if unused is not None:
        unused.update(lost)
    return {**rest, **mapped}


def looks_like(row: Values, wanted: Collection[str] = tuple(FORMATS)) -> str | None:
    """The format whose columns a row has: one of those wanted, or else any."""
    found = [name for name, kind in FORMATS.items() if all(row.get(column) is not None for column in kind.columns)]
    if found[:1] == ["unpaired-preference"]:  # without its label a bad answer would be learned
        return found[0]
    return next((name for name in found if name in wanted), found[0] if found else None)


_PUBLIC: tuple[tuple[set[str], dict[str, str]], ...] = (
    ({"instruction", "response"}, {"context": "input", "response": "output"}),  # Dolly
    *(({name, "chosen", "rejected"}, {name: "prompt"}) for name in ("question", "instruction", "query")),  # Orca's pairs
)
"""Names that well-known data sets have for a format's columns: (the columns that tell them, their names)."""


def usual_names(sample: Iterable[Values]) -> dict[str, str]:
    """What dataset.columns would be for rows of a well-known form; empty where they need none."""
    columns: set[str] = set()
    for row in sample:
        columns.update(str(key) for key, value in row.items() if value is not None)
    for told, names in _PUBLIC:
        if told <= columns and not columns & set(names.values()):
            return {key: name for key, name in names.items() if key in columns}
    return {}


_GUESSES = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "problem", "user", "input", "instruction"),
    "completion": ("answer", "response", "output", "target", "solution", "assistant"),
    "chosen": ("chosen_response", "accepted", "preferred", "winner", "better", "positive"),
    "rejected": ("rejected_response", "dispreferred", "loser", "worse", "negative"),
}


def _proposal(columns: Collection[str], wanted: Collection[str]) -> str:
    """What dataset.columns could be for columns of these names."""
    spelled = {column.lower(): column for column in columns}

    def guess(name: str) -> str | None:
        found = next((g for g in (name, *_GUESSES.get(name, ())) if g in spelled), None)
        return None if found is None or name in columns else spelled[found]

    if "messages" in wanted and (found := guess("messages")) is not None:
        return f"; or name yours: dataset.columns: {{{found}: messages}}"
    fitting = next((kind for kind in ("preference", "prompt-completion", "unpaired-preference", "prompt-only") if kind in wanted), None)
    if fitting is None:
        return ""
    needed = {"completion": "answer"} if fitting == "prompt-only" else {}
    pairs = {found: needed.get(name, name) for name in ("prompt", *FORMATS[fitting].columns, *needed) if (found := guess(name)) is not None}
    told = ", ".join(f"{found}: {name}" for found, name in pairs.items() if found != name)
    return f"; or name yours: dataset.columns: {{{told}}}" if told else ""


def detect(sample: Iterable[Values], wanted: Iterable[str], places: Sequence[str] = ()) -> tuple[str, str]:
    """(format, reason) of the first rows; `wanted` are the formats that the objective learns from, `places` where the rows stand.

    Raises UserError when they are of none or of several formats, or of one that does not fit.
    """
    seen: Counter[str | None] = Counter()
    first: dict[str | None, str] = {}
    columns: set[str] = set()
    wanted = tuple(wanted)
    for index, row in enumerate(sample):
        name = looks_like(row, wanted)
        seen[name] += 1
        if name not in first:
            first[name] = f", first {places[index]}" if places else ""
        columns.update(map(str, row))
    known = [name for name in seen if name is not None]
    if len(known) > 1:
        counts = "; ".join(f"{count} {name or 'unknown'}{first[name]}" for name, count in seen.items())
        raise UserError(
            "MixedFormats",
            f"the first rows are of several formats ({counts}); split the data set, or set dataset.format and checks.invalidRows: drop",
        )
    shapes = "; ".join(f"{name}: {FORMATS[name].example}" for name in wanted)
    if not known:
        found = ", ".join(sorted(columns)[:20]) or "none"
        raise UserError(
            "UnknownFormat", f"no known format has the columns found ({found}). Expected one of {shapes}{_proposal(columns, wanted)}"
        )
    if known[0] not in wanted:
        raise UserError(
            "WrongFormat",
            f"the rows are of format {known[0]}, which tuning.objective does not learn from. Expected one of {shapes}{_proposal(columns, wanted)}",
        )
    return known[0], f"rows have {' and '.join(repr(c) for c in FORMATS[known[0]].columns)}"

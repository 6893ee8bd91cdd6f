"""What can be told of an uploaded file without a tokenizer, as its bytes pass: JSON, roles, keys, counts. Pure.

The rest is what the job's own preparation finds; it has the last word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

LONGEST_ROW = 16 * 2**20
"""Bytes."""
_LEAST_ROWS = 10
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ANSWERS = ("assistant",)
_DECODE = msgspec.json.Decoder().decode
MESSAGES, PREFERENCE, PROMPTS, COMPLETION = "messages", "preference", "reinforcement", "prompt-completion"
_KEYS = {
    MESSAGES: {"messages", "tools", "functions", "parallel_tool_calls"},
    PREFERENCE: {"input", "preferred_output", "non_preferred_output"},
    COMPLETION: {"prompt", "completion"},
}


class BadRow(ValueError):
    """Why a row cannot be learned from."""


class RowCheck:
    """Takes a JSONL file in pieces; after `end`, `problem` says what is wrong with it."""

    def __init__(self) -> None:
        self.rows = 0
        self.form = ""
        """Of the first row; the others have to have it, too."""
        self.problem = ""
        self._line = 0
        self._rest = bytearray()

    def feed(self, data: bytes) -> None:
        """The next bytes. After the first problem nothing more is looked at."""
        if self.problem:
            return
        begin = 0
        while (end := data.find(b"\n", begin)) >= 0:
            self._rest += data[begin:end]
            self._take(bytes(self._rest))
            self._rest.clear()
            begin = end + 1
            if self.problem:
                return
        self._rest += data[begin:]
        if len(self._rest) > LONGEST_ROW:
            self.problem = f"line {self._line + 1} has more than {LONGEST_ROW // 2**20} MiB"
            self._rest.clear()

    def end(self) -> None:
        """There are no more bytes."""
        if self._rest and not self.problem:
            self._take(bytes(self._rest))
        self._rest.clear()
        if not self.problem and self.rows < _LEAST_ROWS:
            self.problem = f"the file has {self.rows} row{'s' * (self.rows != 1)}; at least {_LEAST_ROWS} are needed"

    def _take(self, line: bytes) -> None:
        self._line += 1
        line = line.removeprefix(b"\xef\xbb\xbf") if self._line == 1 else line
        if not line.strip():
            return
        try:
            row = _object(line)
            form = form_of(row)
            if self.form and form != self.form:
                raise BadRow(f"is a row of {form}, and those before are of {self.form}")
            self.form = form
            _CHECKS[form](row)
            self.rows += 1
        except BadRow as failure:
            self.problem = f"line {self._line}: {failure}"


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = _DECODE(line)
    except RecursionError:
        raise BadRow("is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise BadRow(f"is no JSON: {failure}") from None
    if not isinstance(row, dict):
        raise BadRow("is no JSON object")
    return row


def form_of(row: dict[str, Any]) -> str:
    """Which of the forms a row has. Raises BadRow."""
    keys = row.keys()
    if "preferred_output" in keys or "non_preferred_output" in keys:
        form = PREFERENCE
    elif "messages" in keys:
        messages = row["messages"]
        last = messages[-1] if isinstance(messages, list) and messages else None
        ends = isinstance(last, dict) and last.get("role") in ("user", "developer", "system")
        form = PROMPTS if ends and keys - _KEYS[MESSAGES] else MESSAGES
    elif "prompt" in keys and "completion" in keys:
        form = COMPLETION
    else:
        names = ", ".join(sorted(map(str, keys)))[:200] or "none"
        raise BadRow(f"has the keys {names}: write messages; input, preferred_output, non_preferred_output; or prompt, completion")
    if form != PROMPTS and (unknown := sorted(keys - _KEYS[form])):
        raise BadRow(f"has the unknown key {unknown[0][:80]!r}")
    return form


def _turns(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{place} is no list of messages")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise BadRow(f"{place}[{index}] is no object with role and content")
        role = turn.get("role")
        if role not in _ROLES:
            raise BadRow(f"{place}[{index}].role is {str(role)[:40]!r}; write one of {', '.join(_ROLES)}")
        content, calls = turn.get("content"), turn.get("tool_calls") or turn.get("function_call")
        if content is None and not (role in _ANSWERS and calls):
            raise BadRow(f"{place}[{index}].content is missing")
        if content is not None and not isinstance(content, str | list):
            raise BadRow(f"{place}[{index}].content is no text")
        if turn.get("weight", 1) not in (0, 1):
            raise BadRow(f"{place}[{index}].weight is neither 0 nor 1")
    return value


def _messages(row: dict[str, Any]) -> None:
    turns = _turns(row["messages"], "messages")
    if not any(turn["role"] in _ANSWERS for turn in turns):
        raise BadRow("messages has no assistant turn: there is nothing to learn")
    if turns[-1]["role"] not in _ANSWERS:
        raise BadRow("messages ends with another turn than the assistant's")


def _preference(row: dict[str, Any]) -> None:
    given = row.get("input")
    if not isinstance(given, dict):
        raise BadRow("input is no object with messages")
    if unknown := sorted(given.keys() - {"messages", "tools", "parallel_tool_calls"}):
        raise BadRow(f"input has the unknown key {unknown[0][:80]!r}")
    if given.get("tools"):
        raise BadRow("input.tools is not taken by dpo here: leave it out")
    _turns(given.get("messages"), "input.messages")
    for side in ("preferred_output", "non_preferred_output"):
        if _turns(row.get(side), side)[-1]["role"] not in _ANSWERS:
            raise BadRow(f"{side} does not end with the assistant's turn")
    if row["preferred_output"] == row["non_preferred_output"]:
        raise BadRow("preferred_output and non_preferred_output are the same")


def _completion(row: dict[str, Any]) -> None:
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            raise BadRow(f"{name} is no text")
    if not row["completion"].strip():
        raise BadRow("completion is empty: there is nothing to learn")


def _prompts(row: dict[str, Any]) -> None:
    _turns(row["messages"], "messages")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    MESSAGES: _messages,
    PREFERENCE: _preference,
    COMPLETION: _completion,
    PROMPTS: _prompts,
}

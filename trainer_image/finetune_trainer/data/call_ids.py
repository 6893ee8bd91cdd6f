"""Ids of calls in the one form that some templates take: Mistral's refuse all but nine letters, and rows have OpenAI's, or none."""

from __future__ import annotations

import hashlib
from typing import Any

from .chat_template import ChatTemplate, Form
from .shape import BadRow, Shape

REWRITTEN = "toolCallIdsRewritten"
"""What a row is noted with whose ids were."""
_LENGTH = 9


def asks_for_nine(template: ChatTemplate) -> bool:
    """Whether a template refuses a call for its id alone."""

    def takes(identifier: str) -> bool:
        call = {"id": identifier, "type": "function", "function": {"name": "f", "arguments": {}}}
        turns: list[Shape] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "result", "tool_call_id": identifier},
            {"role": "assistant", "content": "answer"},
        ]
        for form in (Form(), Form(arguments="text"), Form(empty="absent")):
            try:
                template.render(turns, form=form)
            except BadRow:
                continue
            return True
        return False

    return not takes("call_abcdefgh") and takes("abcdefghi")


def with_nine(row: Shape) -> Shape:
    """The row with an id of nine letters for each call and its result, made from its own, or from its place; itself where all have."""
    head = row.get("messages", row.get("prompt"))
    if not isinstance(head, list):
        return row
    found = dict(row)
    for key in ("messages", "prompt"):
        if key in row:
            found[key] = _rewritten(row[key])
    for key in ("chosen", "rejected"):
        if key in row:
            found[key] = _rewritten([*head, *row[key]])[len(head) :]
    return row if found == row else found


def _rewritten(messages: list[Shape]) -> list[Shape]:
    known: dict[str, str] = {}
    waiting: list[str] = []
    found = []
    for place, turn in enumerate(messages):
        if turn.get("tool_calls"):
            calls: list[dict[str, Any]] = []
            waiting = []
            for number, call in enumerate(turn["tool_calls"]):
                own = call.get("id")
                waiting.append(_fitting(own or f"{place}.{number}"))
                known.update({own: waiting[-1]} if own else {})
                calls.append({"id": waiting[-1], **{key: value for key, value in call.items() if key != "id"}})
            turn = {**turn, "tool_calls": calls}
        elif turn["role"] == "tool":
            own = turn.get("tool_call_id")
            made = known.get(own) or _fitting(own) if own else waiting[0] if waiting else _fitting(str(place))
            waiting = [identifier for identifier in waiting if identifier != made]
            turn = {**turn, "tool_call_id": made}
        found.append(turn)
    return found


def _fitting(own: str) -> str:
    fits = len(own) == _LENGTH and own.isascii() and own.isalnum()
    return own if fits else hashlib.sha1(own.encode(), usedforsecurity=False).hexdigest()[:_LENGTH]

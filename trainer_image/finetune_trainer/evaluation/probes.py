"""Probes: the held-out prompts on which tuned model and base differ most, with what tells the two apart (finetune_api/probing.py)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from finetune_api.probing import MOST_TOKENS, PROBES, Probe, ProbeAnswer, Probes

from ..data.scan import without_answer
from ..data.shape import Shape, on_the_wire
from ..models.generate import encode
from ..models.likelihood import log_probabilities
from .measure import Asked, Measured, Row, good_rows

_LOOKED_AT = 3 * PROBES
"""Prompts that both models are asked: those that seemed to differ most by what was measured already."""
_PLAIN = 32
"""Tokens of a plain text that stand in place of a prompt."""
Numbers = list[list[list[float]]]
"""Log-probabilities: [candidate][answer][token]."""


@dataclass(frozen=True)
class Candidate:
    """A prompt that may become a probe."""

    messages: list[dict[str, Any]]
    prompt: str
    prompt_ids: list[int]
    answers: list[tuple[str, list[int]]]


def candidates(tokenizer: Any, most: int | None, asked: Asked, base: Measured, tuned: Measured) -> list[Candidate]:
    """Different prompts as the tuned model is asked them, those first on which the two differ most as far as it was measured.

    `most`: tokens that the models have positions for; None for any number.
    """
    rows = good_rows(asked.rows)
    found: dict[str, Candidate] = {}
    for place in sorted(range(len(rows)), key=lambda place: _seeming(place, base, tuned), reverse=True):
        made = _candidate(tokenizer, rows[place], place, asked, base, tuned)
        if made is None or (most is not None and len(made.prompt_ids) + MOST_TOKENS > most):
            continue
        found.setdefault(made.prompt, made)
        if len(found) == _LOOKED_AT:
            break
    return list(found.values())


def _seeming(place: int, base: Measured, tuned: Measured) -> tuple[bool, float]:
    """How much the two seem to differ on a row: whether they answer otherwise, and the difference of their losses."""
    otherwise = bool(base.answers and tuned.answers) and base.answers[place] != tuned.answers[place]
    if "loss" not in base.values or "loss" not in tuned.values:
        return otherwise, 0.0
    before, after = (values[place, 0] / max(1.0, values[place, 1]) for values in (base.values["loss"], tuned.values["loss"]))
    return otherwise, abs(float(before - after))


def _candidate(tokenizer: Any, row: Row, place: int, asked: Asked, base: Measured, tuned: Measured) -> Candidate | None:
    if not asked.prompts:  # a plain text: what it begins with, and how it goes on
        ids = list(row["input_ids"])
        start = min(_PLAIN, len(ids) // 2)
        answer = ids[start : start + MOST_TOKENS]
        return Candidate([], tokenizer.decode(ids[:start]), ids[:start], [(tokenizer.decode(answer), answer)]) if start and answer else None
    prompt, wanted = asked.prompts[place]
    said = [arm.answers[place] for arm in (tuned, base) if arm.answers] or [wanted]
    prompt_ids, *given = encode(tokenizer, [prompt, *dict.fromkeys(said)])
    answers = [(tokenizer.decode(ids[:MOST_TOKENS]), ids[:MOST_TOKENS]) for ids in given if ids]
    shape = json.loads(row["row"])
    return Candidate(_messages(shape), prompt, prompt_ids, answers) if prompt_ids and answers else None


def _messages(shape: Shape) -> list[dict[str, Any]]:
    """The prompt as a chat request sends it; none where it is plain text."""
    prompt = without_answer(shape)
    turns = prompt.get("messages", prompt.get("prompt"))
    return on_the_wire(turns) if isinstance(turns, list) else []


def ask(model: Any, chosen: list[Candidate]) -> Numbers:
    """What a model gives for the answers' tokens."""
    return [[log_probabilities(model, one.prompt_ids, ids) for _, ids in one.answers] for one in chosen]


def make_probes(chosen: list[Candidate], tuned: Numbers, base: Numbers, fingerprint: str) -> Probes:
    """Those of the candidates that tell the two apart best. `fingerprint`: of the base."""
    made = [_probe(*one) for one in zip(chosen, tuned, base, strict=True) if _finite(one[1]) and _finite(one[2])]
    return Probes(fingerprint=fingerprint, probes=sorted(made, key=lambda probe: -probe.distance)[:PROBES])


def _probe(one: Candidate, tuned: list[list[float]], base: list[list[float]]) -> Probe:
    answers = [
        ProbeAnswer(text=text, token_ids=ids, tuned=_rounded(by_tuned), base=_rounded(by_base))
        for (text, ids), by_tuned, by_base in zip(one.answers, tuned, base, strict=True)
    ]
    return Probe(messages=one.messages, prompt=one.prompt, prompt_ids=one.prompt_ids, answers=answers)


def _finite(numbers: list[list[float]]) -> bool:
    return all(math.isfinite(number) for answer in numbers for number in answer)


def _rounded(numbers: list[float]) -> list[float]:
    return [round(number, 6) for number in numbers]

"""Probes: a few held-out prompts by which one tells whether what answers is the tuned model or its base. Pure.

A probe keeps what the tuned model answered and what its base did, each token's log-probability by either. Whoever serves the
model is asked for the log-probabilities of the same tokens: it is the model that it is nearer to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import APIModel
from .scalars import Word

PROBES = 8
"""Prompts that are kept: those held out on which the two differ most."""
NEEDED = 7 / 8
"""Share of them on which a replica has to be nearer to the tuned model."""
LEAST_DISTANCE = 0.02
"""Mean difference of log-probabilities (nats a token) below which rounding in another engine hides which of the two it is."""
MOST_TOKENS = 48
"""Tokens of an answer that are kept."""
ASKED_TOKENS = 8
"""Tokens of an answer that a replica is asked for, each by a request of its own: those in which the two models differ most."""

LogProbability = Annotated[float, Field(le=0)]


class ProbeAnswer(APIModel):
    """An answer, and how likely either model finds its tokens."""

    text: str
    """As text."""
    token_ids: Annotated[list[int], Field(min_length=1, max_length=MOST_TOKENS)]
    """Its tokens."""
    tuned: list[float]
    """Log-probability of each by the tuned model."""
    base: list[float]
    """The same by the base."""

    def telling(self, most: int = ASKED_TOKENS) -> list[int]:
        """Positions of the tokens in which the two models differ most, in their order."""
        apart = [abs(t - b) for t, b in zip(self.tuned, self.base, strict=True)]
        return sorted(sorted(range(len(apart)), key=lambda i: -apart[i])[:most])


class Probe(APIModel):
    """A held-out prompt with both answers."""

    messages: list[dict[str, Any]] = []
    """The prompt as a chat request sends it; empty for a plain text."""
    prompt: str
    """The prompt as text, as the chat template renders it."""
    prompt_ids: Annotated[list[int], Field(min_length=1)]
    """Its tokens."""
    answers: Annotated[list[ProbeAnswer], Field(min_length=1, max_length=2)]
    """The tuned model's, then the base's where it is another one."""

    @property
    def distance(self) -> float:
        """How far apart the two models are: mean absolute difference of the tokens' log-probabilities, in nats."""
        return _mean([abs(t - b) for answer in self.answers for t, b in zip(answer.tuned, answer.base, strict=True)])

    def narrowed(self) -> Probe:
        """The same with the telling tokens alone: what `judge` compares with where others were not asked for."""

        def of(answer: ProbeAnswer) -> ProbeAnswer:
            lists = {name: [getattr(answer, name)[i] for i in answer.telling()] for name in ("token_ids", "tuned", "base")}
            return answer.model_copy(update=lists)

        return self.model_copy(update={"answers": [of(answer) for answer in self.answers]})


class Probes(APIModel):
    """probes/NUMBER.json."""

    fingerprint: Word = ""
    """Of the base that they were made with."""
    probes: Annotated[list[Probe], Field(max_length=PROBES)] = []
    """At most eight."""


@dataclass(frozen=True)
class ProbeVerdict:
    """What one replica, or one exported form, turned out to be."""

    state: Literal["Verified", "Mismatch", "Unverifiable"]
    nearer: int
    """Probes on which it is nearer to the tuned model."""
    asked: int
    distance: float
    """Mean distance between tuned model and base over the probes, in nats a token."""
    message: str


def judge(probes: Sequence[Probe], found: Sequence[Sequence[Sequence[float]]]) -> ProbeVerdict:
    """Which of the two models gave the log-probabilities `found`: [probe][answer][token], in the probes' own order.

    A log-probability that is no number counts as not nearer: an engine whose weights are damaged is nobody's. Where fewer than eight
    are there (few were held out, or a person's were erased), a single miss, which eight would bear, tells neither.
    """
    asked = len(probes)
    distance = _mean([probe.distance for probe in probes])
    if not probes:
        return ProbeVerdict("Unverifiable", 0, 0, 0.0, "no probe is there to ask")
    if distance < LEAST_DISTANCE:
        told = f"tuned model and base differ by {distance:.3g} nats a token on {asked} probes, less than {LEAST_DISTANCE:g}"
        return ProbeVerdict("Unverifiable", 0, asked, distance, f"the two cannot be told apart: {told}")
    nearer = sum(_is_nearer(probe, numbers) for probe, numbers in zip(probes, found, strict=True))
    good = nearer >= math.ceil(asked * NEEDED)
    told = f"nearer to the tuned model than to its base on {nearer} of {asked} probes ({distance:.3g} nats a token apart)"
    if asked < PROBES and nearer == asked - 1 > asked / 2 and all(map(_is_finite, found)):
        return ProbeVerdict("Unverifiable", nearer, asked, distance, f"{told}, and {asked} are too few to tell which it is")
    return ProbeVerdict("Verified" if good else "Mismatch", nearer, asked, distance, told)


def _is_finite(found: Sequence[Sequence[float]]) -> bool:
    return all(math.isfinite(number) for numbers in found for number in numbers)


def _is_nearer(probe: Probe, found: Sequence[Sequence[float]]) -> bool:
    to_tuned, to_base = [], []
    for answer, numbers in zip(probe.answers, found, strict=True):
        to_tuned += [abs(number - wanted) for number, wanted in zip(numbers, answer.tuned, strict=True)]
        to_base += [abs(number - wanted) for number, wanted in zip(numbers, answer.base, strict=True)]
    return _mean(to_tuned) < _mean(to_base)


def _mean(numbers: Sequence[float]) -> float:
    """NaN where one of them is."""
    return sum(numbers) / len(numbers) if numbers else 0.0

"""How good one generated answer is: shared by the evaluation's metrics and by GRPO's rewards. All give 0..1."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_THOUGHT = "</think>"
_PUNCTUATION = re.compile(r"[^\w\s]")


def final_answer(text: str) -> str:
    """What is said behind the thoughts: they are no part of what is compared."""
    return text.rpartition(_THOUGHT)[2]


def exact_match(answer: str, wanted: str) -> float:
    """Equal but for white space around."""
    return float(answer.strip() == wanted.strip())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split()


def f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD computes it (https://arxiv.org/abs/1606.05250)."""
    given, target = _words(answer), _words(wanted)
    shared = sum((Counter(given) & Counter(target)).values())
    if not given or not target:
        return float(given == target)
    return 2 * shared / (len(given) + len(target))


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(answer: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words (https://aclanthology.org/W04-1013)."""
    return float(_rouge().score(wanted, answer)["rougeL"].fmeasure)


def parse_json(answer: str) -> Any:
    """The JSON of an answer, also within a fenced block. Raises ValueError."""
    text = answer.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        return json.loads(fenced.group(1) if fenced else text)
    except RecursionError as failure:
        raise ValueError("nested too deeply") from failure


def valid_json(answer: str, _: str = "") -> float:
    """Whether the answer is JSON."""
    try:
        parse_json(answer)
    except ValueError:
        return 0.0
    return 1.0


@functools.cache
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for

    document = json.loads(schema)
    return validator_for(document)(document)


def satisfies(schema: str, answer: str) -> float:
    """Whether the answer is JSON that satisfies the schema."""
    try:
        return float(_validator(schema).is_valid(parse_json(answer)))
    except ValueError:
        return 0.0


def matches(pattern: str, answer: str) -> float:
    """Whether the whole answer matches the regular expression."""
    return float(re.fullmatch(pattern, answer.strip(), re.DOTALL) is not None)

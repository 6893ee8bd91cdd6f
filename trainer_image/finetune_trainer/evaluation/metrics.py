"""The metrics of an evaluation, one entry each; docs/evaluation.md defines them and docs/extending.md shows how to add one.

A metric gives a numerator and a denominator for each row; their sums make its value, and resampling the rows its
confidence interval (Efron, Tibshirani: An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune_api.spec import Evaluation, Metric

from . import answers

Values = np.ndarray[Any, Any]
"""float64 of shape (rows, 2): numerator and denominator."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class MetricKind:
    """How one metric is computed and read."""

    needs: Literal["tokens", "answers", "pairs", "judge"]
    """What is run on the models: a forward pass, generation, a pass over both answers of a pair, a judge over generated answers."""
    score: Callable[[Evaluation], Callable[[str, str], float]] | None = None
    """For `answers`: the score of (answer, wanted answer)."""
    lower_is_better: bool = False
    relative: bool = False
    """Whether improvement is relative to the base's value; else it is the difference."""
    value: Callable[[float], float] = float
    """From the mean to the metric."""


def _plain(function: Callable[[str, str], float]) -> Callable[[Evaluation], Callable[[str, str], float]]:
    return lambda _: function


METRICS: dict[Metric, MetricKind] = {
    "loss": MetricKind("tokens", lower_is_better=True, relative=True),
    "perplexity": MetricKind("tokens", lower_is_better=True, relative=True, value=lambda mean: math.exp(min(mean, 700.0))),
    "token-accuracy": MetricKind("tokens"),
    "exact-match": MetricKind("answers", _plain(answers.exact_match)),
    "f1": MetricKind("answers", _plain(answers.f1)),
    "rouge-l": MetricKind("answers", _plain(answers.rouge_l)),
    "valid-json": MetricKind("answers", _plain(answers.valid_json)),
    "json-schema": MetricKind("answers", lambda spec: lambda answer, _: answers.satisfies(str(spec.json_schema), answer)),
    "regex": MetricKind("answers", lambda spec: lambda answer, _: answers.matches(str(spec.regex), answer)),
    "preference-accuracy": MetricKind("pairs"),
    "judge-win-rate": MetricKind("judge"),
}


def value(metric: Metric, values: Values) -> float:
    """The metric over all rows."""
    return METRICS[metric].value(float(values[:, 0].sum() / max(1e-12, values[:, 1].sum())))


def improvement(metric: Metric, base: float, tuned: float) -> float:
    """How much better the tuned model is. A tuned model whose metric is no number is infinitely worse."""
    kind = METRICS[metric]
    if not math.isfinite(tuned):
        return -1e9
    gain = base - tuned if kind.lower_is_better else tuned - base
    if not kind.relative:
        return gain
    return gain / base if math.isfinite(base) and base > 0 else 0.0


def interval(metric: Metric, base: Values, tuned: Values, confidence: float, seed: int) -> tuple[float, float]:
    """Bootstrap interval of the improvement: rows are resampled in pairs, since both models saw the same ones."""
    if not np.isfinite(tuned).all():
        return -1e9, -1e9
    picks = np.random.default_rng(seed).integers(0, len(base), (_RESAMPLES, len(base)))
    gains = [improvement(metric, value(metric, base[pick]), value(metric, tuned[pick])) for pick in picks]
    low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

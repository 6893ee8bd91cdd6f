"""The metrics of an evaluation, one entry each; docs/evaluation.md defines them and docs/extending.md shows how to add one.

A metric gives a numerator and a denominator for each row; their sums make its value, and resampling the prompts its
confidence interval (Efron, Tibshirani: An Introduction to the Bootstrap, 1993). Rows of one prompt are no independent
observations: they are drawn together, or the interval would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
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
    return _ratio(metric, float(values[:, 0].sum()), float(values[:, 1].sum()))


def _ratio(metric: Metric, numerator: float, denominator: float) -> float:
    return METRICS[metric].value(numerator / max(1e-12, denominator))


def improvement(metric: Metric, base: float, tuned: float) -> float:
    """How much better the tuned model is. A tuned model whose metric is no number is infinitely worse."""
    kind = METRICS[metric]
    if not math.isfinite(tuned):
        return -1e9
    gain = base - tuned if kind.lower_is_better else tuned - base
    if not kind.relative:
        return gain
    return gain / base if math.isfinite(base) and base > 0 else 0.0


def interval(
    metric: Metric, base: Values, tuned: Values, confidence: float, seed: int, groups: Sequence[Any] | None = None
) -> tuple[float, float]:
    """Bootstrap interval of the improvement: prompts are resampled in pairs, since both models saw the same ones.

    `groups`: what each row is a part of; unset, each row is alone. The quantiles are widened as Student's t is wider than the normal
    distribution, without which intervals of few observations are too narrow (Hesterberg, https://arxiv.org/abs/1411.5279, "expanded
    percentile").
    """
    if not np.isfinite(tuned).all():
        return -1e9, -1e9
    paired = _sums(np.concatenate([base, tuned], axis=1), groups)
    count = len(paired)
    generator, gains = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        numerator, denominator, other, divisor = paired[generator.integers(0, count, count)].sum(axis=0)
        gains.append(
            improvement(metric, _ratio(metric, float(numerator), float(denominator)), _ratio(metric, float(other), float(divisor)))
        )
    tail = _expanded((1 - confidence) / 2, count)
    low, high = np.quantile(gains, [tail, 1 - tail])
    return float(low), float(high)


def chance(metric: Metric, base: Values, tuned: Values, seed: int, groups: Sequence[Any] | None = None) -> float:
    """How often a difference as large in the tuned model's favor comes about when, prompt by prompt, a coin says which model is which.

    A permutation test: it holds its error rate for any number of prompts and any distribution, which a bootstrap of few does not.
    """
    sign = -1.0 if METRICS[metric].lower_is_better else 1.0
    paired = _sums(np.concatenate([base, tuned], axis=1), groups)
    mine, others = paired.sum(axis=0), np.random.default_rng(seed)

    def gain(sums: Values) -> float:
        before, after = (_ratio(metric, float(sums[i]), float(sums[i + 1])) for i in (0, 2))
        return sign * (after - before)

    seen, exchanged, as_large = gain(mine), paired[:, [2, 3, 0, 1]], 0
    for _ in range(_RESAMPLES):
        swapped = others.random(len(paired)) < 0.5
        as_large += gain(np.where(swapped[:, None], exchanged, paired).sum(axis=0)) >= seen - 1e-12 * abs(seen)
    return (as_large + 1) / (_RESAMPLES + 1)


def least_prompts(confidence: float) -> int:
    """The fewest prompts on which a large effect (Cohen's d of 0.8) is found in 80 % of cases at this confidence.

    Cohen: Statistical Power Analysis for the Behavioral Sciences, 1988; for paired differences, with Guenther's correction for t.
    """
    normal = NormalDist()
    tail, power = normal.inv_cdf((1 + confidence) / 2), normal.inv_cdf(0.8)
    return math.ceil(((tail + power) / 0.8) ** 2 + tail**2 / 2)


def _sums(values: Values, groups: Sequence[Any] | None) -> Values:
    """The sums of the rows of each group."""
    if groups is None:
        return values
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    found = np.zeros((int(places.max()) + 1, values.shape[1]))
    np.add.at(found, places, values)
    return found


def _expanded(tail: float, count: int) -> float:
    """The tail to cut so that a percentile interval of so many observations is as wide as one by Student's t."""
    if count < 2:
        return 0.0
    normal, freedom = NormalDist(), count - 1
    z = normal.inv_cdf(tail)
    # Cornish and Fisher's expansion of the quantile of t
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(t * math.sqrt(count / freedom))

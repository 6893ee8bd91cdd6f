"""Whether the tuned model is good enough to publish. Pure: numbers in, a decision and its reason out."""

from __future__ import annotations

from finetune_api.spec import Evaluation, Metric
from finetune_api.status import EvaluationStatus

from .forgetting import GENERAL_LOSS
from .measure import Measured
from .metrics import improvement, interval, value


def decide(
    spec: Evaluation, seed: int, base: Measured, tuned: Measured, base_scores: dict[str, float], tuned_scores: dict[str, float]
) -> tuple[EvaluationStatus, str]:
    """The status and what people are told: both models' metrics, how sure the difference is, and whether it is enough."""
    metric: Metric = spec.gate.metric if spec.gate is not None else spec.metrics[0]
    before: dict[str, float] = {m: round(value(m, base.values[m]), 6) for m in spec.metrics}
    after: dict[str, float] = {m: round(value(m, tuned.values[m]), 6) for m in spec.metrics}
    gain = improvement(metric, value(metric, base.values[metric]), value(metric, tuned.values[metric]))
    confidence = spec.gate.confidence if spec.gate is not None else 0.95
    low, high = interval(metric, base.values[metric], tuned.values[metric], confidence, seed)
    rows = len(base.values[metric])
    message = f"base -> tuned on {rows} held-out rows: " + ", ".join(f"{m} {before[m]:.4g} -> {after[m]:.4g}" for m in spec.metrics)
    gate = "None"
    if spec.gate is not None:
        passed, why = passes(gain, low, high, spec.gate.min_improvement)
        message += f"; gate on {metric}: {why}"
        gate = "Passed" if passed else "NotPassed"
    elif low <= 0 <= high:
        message += f"; {metric}: no measurable difference, the improvement is {gain:.4g} [{low:.4g}, {high:.4g}]"
    for name in base_scores:
        message += f"; {name} {base_scores[name]:.4g} -> {tuned_scores[name]:.4g}"
    if spec.forgetting is not None and spec.forgetting.max_increase is not None:
        rise = (tuned_scores[GENERAL_LOSS] - base_scores[GENERAL_LOSS]) / max(1e-9, base_scores[GENERAL_LOSS])
        if not rise <= spec.forgetting.max_increase:
            gate = "NotPassed"
            message += f": it rose by {rise:.1%}, evaluation.forgetting.maxIncrease is {spec.forgetting.max_increase:.1%}"
    status = EvaluationStatus(
        base={**before, **base_scores}, tuned={**after, **tuned_scores}, examples=rows, improvement=round(gain, 6),
        interval=[round(low, 6), round(high, 6)], gate=gate,  # type: ignore[arg-type]
    )  # fmt: skip
    return status, message


def passes(gain: float, low: float, high: float, least: float) -> tuple[bool, str]:
    """Whether a gate passes, and why: the improvement must be large enough, and measurable."""
    span = f"{gain:.4g} [{low:.4g}, {high:.4g}]"
    if low <= 0 <= high and not low == high == gain:
        return False, f"no measurable difference: the improvement is {span}"
    if gain < least or gain <= 0:
        return False, f"the improvement is {span}, at least {least:g} is wanted"
    return True, f"the improvement is {span}, at least {least:g} was wanted"

"""Whether the tuned model is good enough to publish. Pure: numbers in, a decision and its reason out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.evaluation_status import PROMPTING_MAY_DO, ArmName, ChampionComparison, EvaluationArm, EvaluationStatus, Gated
from finetune_api.spec import Evaluation, Gate, Metric

from .forgetting import GENERAL_LOSS
from .measure import Measured
from .metrics import Values, chance, improvement, interval, least_prompts, value

_NAMED: dict[str, ArmName] = {"base": "Base", "instructed": "Instructed", "few-shot": "FewShot"}
_ASKED = {"Base": "as it is", "Instructed": "with an instruction", "FewShot": "with {} examples"}


@dataclass(frozen=True)
class Verdict:
    """What is told of an evaluation."""

    status: EvaluationStatus
    reason: str
    """Of the condition Evaluated."""
    message: str


@dataclass(frozen=True)
class Gain:
    """How much better the tuned model is than one arm of its base, and how sure that is."""

    arm: ArmName
    gain: float
    low: float
    high: float
    chance: float
    """How often so much comes about where there is no difference."""
    confidence: float

    @property
    def measurable(self) -> bool:
        """Whether it is better beyond chance."""
        return self.low > 0 and self.chance <= (1 - self.confidence) / 2

    @property
    def span(self) -> str:
        """For people."""
        return f"{self.gain:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Challenged:
    """The champion of then beside the tuned model."""

    comparison: ChampionComparison
    arm: Measured | None = None
    """What it did, on the rows that neither learned from."""
    message: str = ""
    """For people."""


def decide(
    spec: Evaluation, seed: int, arms: Sequence[Measured], groups: Sequence[Any] | None = None, champion: Challenged | None = None
) -> Verdict:
    """The verdict on the arms, of which the tuned model's is the last. `groups`: the prompt that each row belongs to."""
    gate = compared_by(spec)
    metric, tuned = gate.metric, arms[-1]
    compared = {arm.name: _pair(metric, arm, tuned) for arm in arms[:-1]}
    strongest = _strongest(metric, compared)
    against = strongest if gate.compare_with == "best-of-base" else _NAMED[gate.compare_with]
    found = _gain(gate, seed, against if against in compared else "Base", compared, groups)
    rows = len(compared["Base"][0])
    prompts = rows if groups is None else len(set(groups))
    least = least_prompts(gate.confidence)

    gated: Gated = "None"
    message = f"{rows} held-out rows of {prompts} prompts: {_told(spec, arms)}"
    shown = f"the tuned model and its base {_asked(found.arm, arms)}"
    if spec.gate is not None:
        gated, why = passes(found, gate.min_improvement, prompts, least)
        message += f"; gate on {metric}, {shown}: {why}"
    elif found.low <= 0 <= found.high:
        message += f"; {metric}: no measurable difference between {shown}, the improvement is {found.span}"
    reason = "Compared"
    prompted = [name for name in compared if name != "Base"]
    if prompted and prompts >= least:
        best = _strongest(metric, {name: compared[name] for name in prompted})
        other = found if best == found.arm else _gain(gate, seed, best, compared, groups)
        if not other.measurable:
            reason = PROMPTING_MAY_DO
            message += f"; prompting may do: the base {_asked(best, arms)} is not measurably worse, the improvement over it is {other.span}"
    base = arms[0]
    for name in base.scores:
        message += f"; {name} {base.scores[name]:.4g} -> {tuned.scores[name]:.4g}"
    if spec.forgetting is not None and spec.forgetting.max_increase is not None:
        rise = (tuned.scores[GENERAL_LOSS] - base.scores[GENERAL_LOSS]) / max(1e-9, base.scores[GENERAL_LOSS])
        if not rise <= spec.forgetting.max_increase:
            gated = "NotPassed"
            message += f": it rose by {rise:.1%}, evaluation.forgetting.maxIncrease is {spec.forgetting.max_increase:.1%}"
    shown_arms = [*arms[:-1], *([champion.arm] if champion is not None and champion.arm is not None else []), tuned]
    if champion is not None:
        message += f"; {champion.message}"
    status = EvaluationStatus(
        arms=[_wire(spec, arm, tuned, found.arm) for arm in shown_arms], examples=rows, prompts=prompts, compared_with=found.arm,
        improvement=_short(found.gain), interval=[_short(found.low), _short(found.high)], gate=gated,
        champion=None if champion is None else champion.comparison,
    )  # fmt: skip
    return Verdict(status, reason, message)


def compared_by(spec: Evaluation) -> Gate:
    """What models are compared by: the gate, or what it is by default on the first metric."""
    return spec.gate or Gate(metric=spec.metrics[0])


def challenge(
    spec: Evaluation, seed: int, version: int, champion: Measured, tuned: Measured, groups: Sequence[Any] | None = None
) -> Challenged:
    """The tuned model against the champion, both on the same rows alone, with the gate's own interval."""
    gate = compared_by(spec)
    pair = _pair(gate.metric, champion, tuned)
    rows = len(pair[0])
    prompts = rows if groups is None else len(set(groups))
    told = f"version {version}, the champion, on {prompts} prompts that neither learned from"
    if not math.isfinite(value(gate.metric, pair[0])):
        return unclear(version, f"its {gate.metric} is no number", prompts)
    found = _gain(gate, seed, "Champion", {"Champion": pair}, groups)
    result, why = passes(found, 0.0, prompts, least_prompts(gate.confidence))
    if result == "Inconclusive":
        return unclear(version, too_few(prompts, gate.confidence), prompts)
    comparison = ChampionComparison(
        version=version, prompts=prompts, metric=gate.metric, improvement=_short(found.gain),
        interval=[_short(found.low), _short(found.high)], result=result,
    )  # fmt: skip
    scores = f"{gate.metric} Champion {value(gate.metric, pair[0]):.4g}, Tuned {value(gate.metric, pair[1]):.4g}"
    return Challenged(comparison, champion, f"{told}: {scores}: {why}")


def unclear(version: int, why: str, prompts: int = 0) -> Challenged:
    """The champion cannot be compared with."""
    comparison = ChampionComparison(version=version, prompts=prompts, message=why)
    return Challenged(comparison, None, f"version {version}, the champion: inconclusive: {why}")


def too_few(prompts: int, confidence: float) -> str:
    """Why so many prompts do not tell."""
    return f"{prompts} held-out prompts that neither learned from, at least {least_prompts(confidence)} are needed"


def passes(found: Gain, wanted: float, prompts: int, least: int) -> tuple[Gated, str]:
    """Whether a gate passes, and why: there must be enough to tell by, and the improvement must be large enough, and measurable."""
    if found.gain <= -1e9:
        return "NotPassed", "the tuned model's metric is no number"
    if prompts < least:
        return "Inconclusive", (
            f"inconclusive: {prompts} held-out prompts, and at least {least} are needed to tell at a confidence of {found.confidence:g}. "
            "Hold out more (dataset.eval, evaluation.maxExamples), or set evaluation.gate.onInconclusive: publish"
        )
    if found.low <= 0 <= found.high and not found.low == found.high == found.gain:
        return "NotPassed", f"no measurable difference: the improvement is {found.span}"
    if found.gain < wanted or found.gain <= 0:
        return "NotPassed", f"the improvement is {found.span}, at least {wanted:g} is wanted"
    if not found.measurable:
        return (
            "NotPassed",
            f"no measurable difference: the improvement is {found.span}, by chance so much comes about in {found.chance:.1%} of cases",
        )
    return "Passed", f"the improvement is {found.span}, at least {wanted:g} was wanted"


def _pair(metric: Metric, arm: Measured, tuned: Measured) -> tuple[Values, Values]:
    return arm.values[metric], tuned.against.get(arm.name, {}).get(metric, tuned.values.get(metric))  # type: ignore[return-value]


def _improvement(metric: Metric, base: Values, tuned: Values) -> float:
    return improvement(metric, value(metric, base), value(metric, tuned))


def _strongest(metric: Metric, compared: dict[ArmName, tuple[Values, Values]]) -> ArmName:
    """The arm that the tuned model surpasses by least; one whose metric is no number is surpassed by all."""
    sound = {name: pair for name, pair in compared.items() if math.isfinite(value(metric, pair[0]))} or compared
    return min(sound, key=lambda name: _improvement(metric, *sound[name]))


def _gain(gate: Gate, seed: int, arm: ArmName, compared: dict[ArmName, tuple[Values, Values]], groups: Sequence[Any] | None) -> Gain:
    base, tuned = compared[arm]
    low, high = interval(gate.metric, base, tuned, gate.confidence, seed, groups)
    by_chance = chance(gate.metric, base, tuned, seed, groups)
    return Gain(arm, _improvement(gate.metric, base, tuned), low, high, by_chance, gate.confidence)


def _asked(name: ArmName, arms: Sequence[Measured]) -> str:
    return _ASKED[name].format(next(arm.shots for arm in arms if arm.name == name))


def _told(spec: Evaluation, arms: Sequence[Measured]) -> str:
    """Each metric in all arms, in their order."""
    told = []
    for metric in spec.metrics:
        numbers = [f"{arm.name} {value(metric, _own(metric, arm)):.4g}" for arm in arms]
        told.append(f"{metric} {', '.join(numbers)}")
    return "; ".join(told)


def _own(metric: Metric, arm: Measured, against: ArmName | None = None) -> Values:
    if metric in arm.values:
        return arm.values[metric]
    return arm.against[next(iter(arm.against)) if against is None else against][metric]


def _wire(spec: Evaluation, arm: Measured, tuned: Measured, against: ArmName) -> EvaluationArm:
    measured = [m for m in spec.metrics if m in arm.values or arm is tuned]  # not all of the champion
    found = {m: value(m, _own(m, arm, against if arm is tuned else None)) for m in measured}
    metrics: dict[str, float] = {m: _short(number) for m, number in found.items() if math.isfinite(number)}
    return EvaluationArm(
        name=arm.name, metrics=metrics | arm.scores, shots=arm.shots,
        prompt_tokens=None if arm.prompt_tokens is None else round(arm.prompt_tokens, 1),
        answer_tokens=None if arm.answer_tokens is None else round(arm.answer_tokens, 1),
        latency_seconds=None if arm.latency is None else float(f"{arm.latency:.3g}"),
    )  # fmt: skip


def _short(number: float) -> float:
    return float(f"{number:.6g}")

"""What an evaluation found, as a part of FineTuneJobStatus: the tuned model beside its base, as it is and as it would be used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import APIModel
from .scalars import Count, DecimalText, Told, Word

ArmName = Literal["Base", "Instructed", "FewShot", "Champion", "Tuned"]
Gated = Literal["Passed", "NotPassed", "Inconclusive", "None"]


class EvaluationArm(APIModel):
    """One of the ways in which the held-out rows were answered."""

    name: ArmName
    """Base: as it is. Instructed: with the task's instruction. FewShot: with examples before the question. Champion: the version of the FineTunedModel that is served today. Tuned: the result."""
    metrics: Annotated[dict[Word, DecimalText], Field(max_length=128)] = Field(default_factory=dict)
    """What was measured, by metric."""
    shots: Count = 0
    """Examples that stood before each question."""
    prompt_tokens: DecimalText | None = None
    """Mean tokens that a request sends."""
    answer_tokens: DecimalText | None = None
    """Mean tokens of an answer."""
    latency_seconds: DecimalText | None = None
    """Time until a request that is alone has its whole answer, by the time to the first token and the time of each more."""


class ChampionComparison(APIModel):
    """The tuned model against the champion of the FineTunedModel that it is published to."""

    version: Count = 0
    """Number of that version."""
    prompts: Count = 0
    """Held-out prompts that neither of them, nor what they descend from, learned from."""
    metric: Word = ""
    """What was compared."""
    improvement: DecimalText | None = None
    """Relative for loss and perplexity, absolute for the others."""
    interval: Annotated[list[DecimalText], Field(max_length=2)] = Field(default_factory=list)
    """Bootstrap confidence interval of that improvement."""
    result: Gated = "Inconclusive"
    """Passed: measurably better. NotPassed: not. Inconclusive: too few prompts, or it cannot be asked beside this base."""
    message: Annotated[str, Told(1024)] = ""
    """Why, where it is inconclusive."""


class EvaluationStatus(APIModel):
    """The tuned model against its base on the held-out rows."""

    arms: Annotated[
        list[EvaluationArm],
        Field(max_length=5, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = Field(default_factory=list)
    """The ways in which the rows were answered, the tuned model last."""
    examples: Count = 0
    """Held-out rows compared on."""
    prompts: Count = 0
    """Different prompts (or groups, by `dataset.eval.groupBy`) among them."""
    compared_with: ArmName | None = None
    """The arm that the improvement is measured against: the best of the base's, or the one that the gate names."""
    improvement: DecimalText | None = None
    """Improvement of the gate's metric (of the first metric without a gate): relative for loss and perplexity, absolute for the others."""
    interval: Annotated[list[DecimalText], Field(max_length=2)] = Field(default_factory=list)
    """Bootstrap confidence interval of that improvement; prompts are resampled, not rows."""
    gate: Gated = "None"
    """Whether the gate held. Inconclusive: there are too few prompts to tell."""
    champion: ChampionComparison | None = None
    """The same against the champion of then."""

    def arm(self, name: ArmName) -> EvaluationArm | None:
        """The arm of that name, where there was one."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def metrics(self) -> list[str]:
        """Everything that was measured in some arm."""
        return list(dict.fromkeys(metric for arm in self.arms for metric in arm.metrics))

    def told(self, metric: str) -> str:
        """A metric in all arms for people: `Base 11.3, Instructed 7, Tuned 0.2`."""
        return ", ".join(f"{arm.name} {arm.metrics[metric]:.4g}" for arm in self.arms if metric in arm.metrics)


PROMPTING_MAY_DO = "PromptingMayDo"
"""Reason of Evaluated where the tuned model is not measurably better than its base with an instruction or examples."""

"""grpo: learning from verifiable rewards of sampled answers. A reward is added as one entry of REWARDS."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from finetune_api.spec import Reward

from ...data.chat_template import ChatTemplate
from ...evaluation import answers
from ...job.context import Context
from ...models.generate import spoken
from .base import ObjectiveKind, TrainerSetup

Score = Callable[[str, str], float]


def _length(reward: Reward) -> Score:
    most = reward.max_characters or 1
    return lambda answer, _: max(0.0, min(1.0, 2.0 - len(answer) / most))


COMPARING = ("exact-match",)
"""Rewards that compare with the row's own answer."""
REWARDS: dict[str, Callable[[Reward], Score]] = {
    "exact-match": lambda _: answers.exact_match,
    "regex": lambda reward: lambda answer, _: answers.matches(str(reward.pattern), answer),
    "json-schema": lambda reward: lambda answer, _: answers.satisfies(str(reward.json_schema), answer),
    "length": _length,
}


def reward_function(reward: Reward, speak: Callable[[list[list[int]]], list[str]] | None = None) -> Any:
    """The reward as TRL calls it: over a batch of sampled answers, with the rows' columns by name. An empty answer earns nothing.

    An answer earns what it is worth with its thoughts or without them, whichever is more: a pattern may ask for thoughts. `speak`
    makes texts of tokens, where TRL's own texts do not keep the two apart.
    """
    score = REWARDS[reward.type](reward)

    def worth(text: str, wanted: str) -> float:
        final = answers.final_answer(text)
        return max(score(said, answers.final_answer(wanted)) for said in {text, final}) if final.strip() else 0.0

    def function(completions: list[str], answer: list[str], completion_ids: list[list[int]] | None = None, **_: Any) -> list[float]:
        texts = speak(completion_ids) if speak is not None and completion_ids is not None else completions
        return [worth(text, wanted) for text, wanted in zip(texts, answer, strict=True)]

    function.__name__ = reward.type
    return function


def _arguments(context: Context, common: dict[str, Any]) -> Any:
    from trl import GRPOConfig

    grpo = context.spec.tuning.grpo
    assert grpo is not None
    return GRPOConfig(
        **common,
        num_generations=grpo.generations,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
        beta=grpo.beta,
        reward_weights=[reward.weight for reward in grpo.rewards],
        remove_unused_columns=False,
        log_completions=False,
    )


def _trainer(setup: TrainerSetup) -> Any:
    from trl import GRPOTrainer

    grpo = setup.context.spec.tuning.grpo
    assert grpo is not None

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        """Samples behind the prompts that prepare rendered, with their tools: TRL knows tools as functions that it calls."""

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
            self._rendered = [row["prompt_ids"] for row in inputs]
            return super()._generate_and_score_completions(inputs)

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return self._rendered, None, {}

    lead = ChatTemplate(setup.tokenizer).answer_lead
    speak = functools.partial(spoken, setup.tokenizer, lead=lead) if lead else None
    return Trainer(**setup.trainer_kwargs(), reward_funcs=[reward_function(reward, speak) for reward in grpo.rewards])


GRPO = ObjectiveKind(("prompt", "answer", "prompt_ids"), _arguments, _trainer)

"""grpo: learning from verifiable rewards of sampled answers. A reward is added as one entry of REWARDS."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from finetune_api.spec import Reward

from ...evaluation import answers
from ...job.context import Context
from .base import ObjectiveKind, TrainerSetup

Score = Callable[[str, str], float]


def _length(reward: Reward) -> Score:
    most = reward.max_characters or 1
    return lambda answer, _: max(0.0, min(1.0, 2.0 - len(answer) / most))


REWARDS: dict[str, Callable[[Reward], Score]] = {
    "exact-match": lambda _: answers.exact_match,
    "regex": lambda reward: lambda answer, _: answers.matches(str(reward.pattern), answer),
    "json-schema": lambda reward: lambda answer, _: answers.satisfies(str(reward.json_schema), answer),
    "length": _length,
}


def reward_function(reward: Reward) -> Any:
    """The reward as TRL calls it: over a batch of sampled answers, with the rows' columns by name."""
    score = REWARDS[reward.type](reward)

    def function(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else "".join(str(turn.get("content") or "") for turn in c) for c in completions]
        return [score(text, wanted) for text, wanted in zip(texts, answer, strict=True)]

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


def _prompt_and_answer(row: dict[str, Any]) -> dict[str, Any]:
    """TRL samples from `prompt`: a text, or messages that it renders with the model's own template."""
    shape = json.loads(row["row"])
    if "messages" in shape:
        turns = shape["messages"]
        told = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        prompt = [{"role": t["role"], "content": t["content"]} for t in (turns[:-1] if told else turns)]
        return {"prompt": prompt, "answer": told}
    return {"prompt": shape["prompt"], "answer": shape.get("completion", "")}


def _trainer(setup: TrainerSetup) -> Any:
    from trl import GRPOTrainer

    grpo = setup.context.spec.tuning.grpo
    assert grpo is not None
    parts = setup.trainer_kwargs()
    for side in ("train_dataset", "eval_dataset"):
        if parts[side] is not None:
            parts[side] = parts[side].map(_prompt_and_answer, remove_columns=["row"])
    return GRPOTrainer(**parts, reward_funcs=[reward_function(reward) for reward in grpo.rewards])


GRPO = ObjectiveKind(("row",), _arguments, _trainer)

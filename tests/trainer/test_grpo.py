"""GRPO: what rewards compare with, that sampling sees the tools, and that silence earns nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import Reward
from finetune_trainer.data.store import read_rows
from finetune_trainer.process.errors import UserError
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.training.objectives.grpo import reward_function
from tests.trainer.conftest import COLOURS, ROWS, Bench, chat

HYPER = {"maxSteps": 1, "learningRate": 1e-3, "globalBatchSize": 4, "maxLength": 128}
GRPO = {"generations": 2, "maxNewTokens": 4, "rewards": [{"type": "exact-match"}]}
TUNING = {"objective": "grpo", "grpo": GRPO, "lora": {"rank": 4, "alpha": 8, "dropout": 0}, "hyperparameters": HYPER}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}}}
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}{{ '<|system|>' + t.function.name + '<|end|>' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    "row",
    [
        lambda q, a: {"prompt": q, "answer": a},
        lambda q, a: {"prompt": q, "solution": a},
        lambda q, a: {"prompt": [{"role": "user", "content": q}], "solution": a},
        lambda q, a: {"prompt": q, "completion": a},
        chat,
    ],
)
def test_rewards_compare_with_the_rows_answer(bench: Bench, row: Any) -> None:
    context = bench.context([row(q, a) for q, a in COLOURS], tuning=TUNING)
    prepare(context)
    rows = read_rows(context.layout.train_rows, ("prompt", "answer"), 1000)
    assert rows and all(any(q in r["prompt"] and r["answer"] == a for q, a in COLOURS) for r in rows)


def test_numbers_are_answers(bench: Bench) -> None:
    context = bench.context([{"prompt": f"what is {n}", "answer": n} for n in range(8)], tuning=TUNING)
    prepare(context)
    assert {r["answer"] for r in read_rows(context.layout.train_rows, ("answer",), 99)} <= {str(n) for n in range(8)}


def test_a_reward_without_anything_to_compare_with_is_refused(bench: Bench) -> None:
    with pytest.raises(
        UserError, match=r"train row 1 .*: tuning.grpo.rewards exact-match compares with the row's own answer, and it has none"
    ):
        prepare(bench.context(ROWS["prompt-only"], tuning=TUNING))
    free = {**GRPO, "rewards": [{"type": "length", "maxCharacters": 9}]}
    prepare(bench.context(ROWS["prompt-only"], name="free", tuning={**TUNING, "grpo": free}))


@pytest.mark.parametrize(
    "reward",
    [
        {"type": "exact-match"},
        {"type": "regex", "pattern": ".*"},
        {"type": "length", "maxCharacters": 9},
        {"type": "json-schema", "jsonSchema": "{}"},
    ],
)
def test_an_empty_answer_earns_nothing(reward: dict[str, Any]) -> None:
    function = reward_function(Reward.model_validate(reward))
    said = ["", " \n", "<think>1</think> ", "1", "<think>hm</think>1"]
    assert function(completions=said, answer=["", "", "", "1", "<think>so</think>1"], prompts=["p"] * 5) == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_pattern_may_ask_for_thoughts_or_for_the_answer() -> None:
    for pattern, worth in (("<think>.+</think>.+", [1.0, 0.0]), (r"\d", [1.0, 1.0])):
        function = reward_function(Reward.model_validate({"type": "regex", "pattern": pattern}))
        assert function(completions=["<think>hm</think>7", "7"], answer=["", ""]) == worth
    spoken = reward_function(Reward.model_validate({"type": "exact-match"}), lambda ids: [f"<think>{i}</think>7" for i in ids])
    assert spoken(completions=["hm7"], completion_ids=[[1, 2]], answer=["7"]) == [1.0], "tokens keep thoughts and answer apart"


def test_sampling_sees_the_tools(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    seen: list[list[int]] = []
    real = GRPOTrainer._generate_single_turn

    def look(self: Any, prompt_ids: list[list[int]], *more: Any) -> Any:
        seen.extend(prompt_ids)
        return real(self, prompt_ids, *more)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", look)
    rows = [{**chat(q, a), "tools": [TOOL]} for q, a in COLOURS[:12]]
    context = bench.context(rows, tuning={**TUNING, "chatTemplate": WITH_TOOLS})
    bench.train(context)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    prepared = {tuple(r["prompt_ids"]) for r in read_rows(context.layout.train_rows, ("prompt_ids",), 99)}
    assert seen and {tuple(ids) for ids in seen} <= prepared, "what prepare rendered is what is sampled behind"
    assert all(tokenizer.decode(ids).startswith("<|system|>paint<|end|><|user|>") for ids in seen)
    assert json.loads(Path(context.layout.plan).read_text())["totalSteps"] == 1


def test_sampled_answers_count_among_the_positions(bench: Bench) -> None:
    from tests.trainer.bases import make

    make("GPT2", bench.data / "short", bench.model, max_position_embeddings=32)
    longer = {**TUNING, "grpo": {**GRPO, "maxNewTokens": 31}}
    with pytest.raises(UserError, match=r"the model has 32 positions, .* and tuning.grpo.maxNewTokens 31 behind.*Lower maxNewTokens"):
        prepare(bench.context([{"prompt": q, "answer": a} for q, a in COLOURS], model={"uri": "pvc://rows/short"}, tuning=longer))

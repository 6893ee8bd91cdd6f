"""Methods and objectives, trained on the tiny model, and better for it.

Every method with sft and every objective with lora; every pair that is not refused at apply with FINETUNE_COMBINATIONS=all
(`make combinations`, which a release asks for).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from finetune_api.evaluation_status import EvaluationStatus
from finetune_api.spec import LORA_METHODS, VIRTUAL_TOKEN_METHODS, Method, Objective
from finetune_api.status import Plan
from finetune_api.validation import InvalidDocument, parse_job, parse_spec
from finetune_cli.local import job_file
from finetune_trainer.job.context import Context
from finetune_trainer.stages.evaluate import evaluate
from finetune_trainer.stages.prepare import prepare
from finetune_trainer.stages.publish import publish
from finetune_trainer.stages.worker import fit
from tests.cluster.shell import REPO
from tests.factory import MINIMAL
from tests.trainer.conftest import ROWS, Bench, history

ROWS_OF = {
    "sft": "messages",
    "pretrain": "text",
    "dpo": "preference",
    "orpo": "preference",
    "reward": "preference",
    "kto": "unpaired-preference",
    "grpo": "messages",
    "distill": "messages",
}
METRIC = {
    "dpo": "preference-accuracy",
    "kto": "preference-accuracy",
    "orpo": "preference-accuracy",
    "reward": "preference-accuracy",
    "grpo": "regex",
}
RATES = {"full": 3e-3, "partial": 5e-3, "ia3": 5e-2, "prompt": 0.3, "prefix": 0.1, "p-tuning": 5e-3}
WORKING = {
    "regex": ".*(cat|dog|bird).*",
}


def tuning(objective: str, method: str, **hyper: Any) -> dict[str, Any]:
    """Settings that learn in a few seconds."""
    steps = {"grpo": 60, "dpo": 30, "kto": 60, "reward": 40}.get(objective, 150 if method in VIRTUAL_TOKEN_METHODS else 24)
    rate = RATES.get(method, 1e-2) * {"dpo": 0.5, "kto": 2.0, "reward": 0.5}.get(objective, 1.0)
    made: dict[str, Any] = {
        "objective": objective,
        "method": method,
        "hyperparameters": {"maxSteps": steps, "learningRate": rate, "globalBatchSize": 16, "maxLength": 64, **hyper},
    }
    if method in LORA_METHODS:
        made["lora"] = {"rank": 8, "alpha": 16, "dropout": 0}
    if objective == "grpo":
        made["grpo"] = {"rewards": [{"type": "regex", "pattern": WORKING["regex"]}], "generations": 8, "maxNewTokens": 6}
    if objective == "distill":
        made["distillation"] = {"teacher": {"uri": "pvc://models/tiny"}, "alpha": 0.9}
    return made


def accepted(objective: str, method: str) -> bool:
    try:
        parse_spec({**MINIMAL, "tuning": tuning(objective, method)})
    except InvalidDocument:
        return False
    return True


COMBINATIONS = [(o, m) for o in get_args(Objective) for m in get_args(Method)]
ACCEPTED = [pair for pair in COMBINATIONS if accepted(*pair)]
EVERY_ONE = [(o, m) for o, m in ACCEPTED if o == "sft" or m == "lora"]
"""Each method, and each objective, at least once"""
LEARNING = ACCEPTED if os.environ.get("FINETUNE_COMBINATIONS") == "all" else EVERY_ONE


def test_no_method_and_no_objective_is_left_out() -> None:
    assert {m for _, m in EVERY_ONE} == set(get_args(Method)) and {o for o, _ in EVERY_ONE} == set(get_args(Objective))


@pytest.mark.parametrize(("objective", "method"), LEARNING, ids=[f"{o}-{m}" for o, m in LEARNING])
def test_every_combination_learns(bench: Bench, objective: str, method: str) -> None:
    metric = METRIC.get(objective, "loss")
    evaluation: dict[str, Any] = {"metrics": [metric], "maxNewTokens": 6}
    if metric == "regex":
        evaluation["regex"] = WORKING["regex"]
    base, tuned, context = bench.run(ROWS[ROWS_OF[objective]], tuning=tuning(objective, method), evaluation=evaluation)
    if metric == "loss":
        assert tuned["loss"] < 0.9 * base["loss"], (base, tuned)
    elif objective == "reward":
        assert tuned[metric] > max(0.6, base[metric] + 0.2), (base, tuned)  # the base has no head worth the name
    elif objective == "grpo":  # what is learned is the reward of sampled answers, see below; the likeliest answer may lag behind
        assert tuned[metric] >= base[metric], (base, tuned)
    else:
        assert tuned[metric] > base[metric] or tuned[metric] == 1.0, (base, tuned)
    steps = [e for e in history(context) if e.get("loss") is not None]
    if objective == "grpo":
        rewards = [e["metrics"]["reward"] for e in steps]
        assert sum(rewards[-10:]) > sum(rewards[:10]) + 1.0, rewards
    else:
        first, last = (sum(e["loss"] for e in part) for part in (steps[:4], steps[-4:]))
        assert last < first, [e["loss"] for e in steps]


REFUSED = [pair for pair in COMBINATIONS if pair not in ACCEPTED]


@pytest.mark.parametrize(("objective", "method"), REFUSED, ids=[f"{o}-{m}" for o, m in REFUSED])
def test_what_does_not_work_is_refused_at_apply(objective: str, method: str) -> None:
    with pytest.raises(InvalidDocument, match="set method to lora"):
        parse_spec({**MINIMAL, "tuning": tuning(objective, method)})


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_the_examples_of_other_objectives(tmp_path: Path, tiny_model: Path, name: str) -> None:
    metadata, spec = parse_job(yaml.safe_load((REPO / "examples" / f"{name}.yaml").read_text()))
    volumes = {"models": str(tiny_model.parent), "colours": str(REPO / "examples" / "data"), "published": str(tmp_path / "published")}
    context = Context(job_file(metadata, spec, volumes), str(tmp_path / "workspace"))
    assert fit(context, Plan.model_validate(prepare(context).result["plan"])) is not None
    found = EvaluationStatus.model_validate(evaluate(context).result)
    assert found.gate == "Passed" and found.interval[0] > 0
    publish(context)
    assert (tmp_path / "published" / name / "adapter_model.safetensors").exists()

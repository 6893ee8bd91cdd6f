"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a model."""

from __future__ import annotations

import os
from typing import Any

from ..process.errors import InfrastructureError, StageError, UserError
from ..remote.retry import error_for_exception, hub_host

OWN_TASKS = "FINETUNE_HARNESS_TASKS"
"""Environment variable: a folder with task files of one's own."""


def fetch(tasks: list[str]) -> None:
    """In prepare: the tasks' data into the workspace's cache, so that no GPU waits for a hub. Raises UserError for an unknown task."""
    from lm_eval.tasks import TaskManager

    _load(TaskManager(include_path=os.environ.get(OWN_TASKS)), tasks)


def _load(manager: Any, tasks: list[str]) -> None:
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError("UnknownTask", f"evaluation.harnessTasks: lm-evaluation-harness has no task {', '.join(unknown)}")
    try:
        manager.load(list(tasks))
    except (ConnectionError, OSError) as failure:
        raise _not_loaded(tasks, failure) from failure


def _not_loaded(tasks: list[str], failure: Exception) -> StageError:
    message = f"the data of {', '.join(tasks)} cannot be loaded: {str(failure)[:300]}"
    return error_for_exception(failure, hub_host(), lambda why: UserError("TaskNotLoaded", f"{message} ({why})")) or InfrastructureError(
        "TaskNotLoaded", message
    )


def run_tasks(model: Any, tokenizer: Any, tasks: list[str], limit: int | None, seed: int) -> dict[str, float]:
    """Each task's metrics as `task/metric`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=os.environ.get(OWN_TASKS))
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        found = simple_evaluate(
            wrapped, tasks=list(tasks), limit=limit, task_manager=manager, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except (ConnectionError, OSError) as failure:
        raise _not_loaded(tasks, failure) from failure
    scores: dict[str, float] = {}
    for task, results in (found or {}).get("results", {}).items():
        for name, number in results.items():
            metric, _, which = name.partition(",")
            if isinstance(number, float) and not metric.endswith("_stderr") and which in ("", "none"):
                scores[f"{task}/{metric}"] = round(number, 6)
    return scores

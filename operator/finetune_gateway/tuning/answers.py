"""A FineTuneJob as OpenAI's job object: its status, its names, its numbers. Pure."""

from __future__ import annotations

import calendar
import hashlib
from datetime import datetime
from typing import Any

from finetune_api.scalars import seconds
from finetune_api.status import Phase

from ..catalog import Asked
from .jobs import Job, base_name, model_name

CANCELLED = "Cancelled"
"""Reason of the condition Failed of a job that somebody ended."""
_STATUS: dict[Phase, str] = {
    "Pending": "validating_files",
    "Preparing": "validating_files",
    "Queued": "queued",
    "Starting": "queued",
    "Suspended": "queued",
    "Training": "running",
    "Evaluating": "running",
    "Publishing": "running",
}
"""Of jobs that have not ended. OpenAI knows no `paused`: a suspended job is queued, and an event tells."""


def unix(time: str | None) -> int | None:
    """Seconds since 1970 of a Timestamp; None for what is none."""
    try:
        return calendar.timegm(datetime.fromisoformat(time or "").utctimetuple())
    except ValueError:
        return None


def status_of(job: Job) -> str:
    """In OpenAI's words. A job that is to be cancelled is: that cannot be taken back."""
    status = job.status
    if status.is_true("Succeeded"):
        return "succeeded"
    if (failed := status.condition("Failed")) is not None and failed.status == "True":
        return "cancelled" if failed.reason == CANCELLED else "failed"
    if job.spec is not None and job.spec.run_policy.cancel:
        return "cancelled"
    if job.spec is not None and job.spec.run_policy.suspend:
        return "queued"
    return _STATUS.get(status.phase, "running")


def results_id(job: Job) -> str:
    """Id of the file of a job's step metrics."""
    return "file-" + hashlib.sha256(f"results\n{job.uid}".encode()).hexdigest()[:24]


def has_results(job: Job) -> bool:
    """Whether there is one: it has ended, and had trained."""
    return job.status.finished and job.status.progress is not None


def job_object(job: Job) -> dict[str, Any]:
    """The whole answer."""
    status, told = status_of(job), job.request
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": unix(job.created) or 0,
        "finished_at": unix(job.status.finished_at) if job.status.finished else None,
        "estimated_finish": _estimate(job) if status == "running" else None,
        "model": base_name(job),
        "fine_tuned_model": model_name(job) if status == "succeeded" else None,
        "organization_id": job.namespace,
        "status": status,
        "training_file": told.get("training_file") or (job.spec.dataset.train.uri if job.spec is not None else ""),
        "validation_file": told.get("validation_file") or _held_out(job),
        "hyperparameters": _hyperparameters(job),
        "method": _method(job),
        "result_files": [results_id(job)] if has_results(job) else [],
        "trained_tokens": _trained_tokens(job) if status == "succeeded" else None,
        "error": _error(job) if status == "failed" else None,
        "seed": job.spec.tuning.hyperparameters.seed if job.spec is not None else 0,
        "integrations": told.get("integrations") or [],
        "metadata": told.get("metadata") or {},
    }


def _held_out(job: Job) -> str | None:
    found = job.spec.dataset.eval if job.spec is not None else None
    return found.uri if found is not None else None


def _hyperparameters(job: Job) -> dict[str, Any]:
    """What the job runs with: `auto` has been decided when it was made."""
    if job.spec is None:
        return {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    settings = job.spec.tuning.hyperparameters
    epochs = int(settings.epochs) if settings.epochs == int(settings.epochs) else settings.epochs
    asked = (told_method(job.request).get("hyperparameters") or {}).get("learning_rate_multiplier")
    return {
        "n_epochs": epochs,
        "batch_size": settings.global_batch_size,
        "learning_rate_multiplier": 1.0 if asked in (None, "auto") else asked,
    }


def told_method(request: dict[str, Any]) -> dict[str, Any]:
    """The settings of the method that a request chose, wherever it said them."""
    method = request.get("method")
    if isinstance(method, dict):
        found = method.get(str(method.get("type")))
        return found if isinstance(found, dict) else {}
    older = request.get("hyperparameters")
    return {"hyperparameters": older} if isinstance(older, dict) else {}


def _method(job: Job) -> dict[str, Any]:
    objective = job.spec.tuning.objective if job.spec is not None else "sft"
    numbers = _hyperparameters(job)
    if objective == "grpo":
        grader = told_method(job.request).get("grader")
        return {"type": "reinforcement", "reinforcement": {"grader": grader or {}, "hyperparameters": numbers}}
    if objective == "dpo":
        preference = job.spec.tuning.preference if job.spec is not None else None
        beta = preference.beta if preference is not None else 0.1
        return {"type": "dpo", "dpo": {"hyperparameters": {**numbers, "beta": beta}}}
    return {"type": "supervised", "supervised": {"hyperparameters": numbers}}


def _estimate(job: Job) -> int | None:
    """End of training by the trainer's own estimate; evaluation and publishing come after it."""
    progress = job.status.progress
    if progress is None or not progress.eta or (told := unix(progress.reported_at)) is None:
        return None
    try:
        return told + seconds(progress.eta)
    except ValueError:
        return None


def _trained_tokens(job: Job) -> int | None:
    dataset, progress = job.status.dataset, job.status.progress
    if dataset is None or job.spec is None:
        return None
    epochs = progress.epoch if progress is not None and progress.epoch else job.spec.tuning.hyperparameters.epochs
    return round(dataset.tokens * float(epochs))


def _error(job: Job) -> dict[str, Any]:
    failed = job.status.condition("Failed")
    assert failed is not None
    about_rows = not job.status.is_true("DataReady")
    return {"code": failed.reason, "message": failed.message or failed.reason, "param": "training_file" if about_rows else None}


def version_of(job: Job) -> str:
    """NAME@VERSION of what was published to a FineTunedModel; empty: nothing was."""
    return next((f"{found.model}@{found.version}" for found in job.status.artifacts if found.model and found.version), "")


def resolve(job: Job) -> Asked | None:
    """What its result is called at an endpoint; None where it has none that an endpoint can serve."""
    name, _, number = version_of(job).partition("@")
    return Asked(job.namespace, name, int(number)) if number and status_of(job) == "succeeded" else None

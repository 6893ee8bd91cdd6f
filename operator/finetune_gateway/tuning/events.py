"""A job's history in OpenAI's events: what can be told of one state of it. The store keeps them all, each once. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.status import Condition

from .answers import CANCELLED, unix
from .jobs import Job, model_name

_TOLD = {
    "DataReady": "Files validated, moving job to queued state",
    "Running": "Fine-tuning job started",
    "Trained": "Training has ended",
    "Evaluated": "The tuned model was compared with its base",
    "Published": "The tuned model was published",
}
_ORDER = {name: index for index, name in enumerate(("created", "validating", *_TOLD, "queued", "Suspended", "restart", "model", "end"))}
_METRICS = {
    "train_loss": "loss",
    "valid_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "tokens_per_second": "tokens_per_second",
    "epoch": "epoch",
}
COLUMNS = ("step", *_METRICS)
"""Of the step metrics that a job's result file has."""


@dataclass(frozen=True)
class Event:
    """One line of a job's history. The same state gives the same id, whoever looks."""

    id: str
    job: str
    """UID."""
    created_at: int
    """Seconds since 1970."""
    position: int
    """Order within a second."""
    level: str
    type: str
    message: str
    data: str = ""
    """JSON; empty: none."""
    step: int | None = None
    """Of metrics and checkpoints."""

    def to_wire(self) -> dict[str, Any]:
        """As OpenAI has it."""
        return {
            "id": self.id,
            "object": "fine_tuning.job.event",
            "created_at": self.created_at,
            "level": self.level,
            "message": self.message,
            "type": "metrics" if self.type == "metrics" else "message",
            "data": json.loads(self.data) if self.data else None,
        }


def events_of(job: Job) -> list[Event]:
    """Oldest first."""
    return sorted(_events(job), key=lambda event: (event.created_at, event.position, event.id))


def _event(job: Job, kind: str, key: str, at: int, message: str, level: str = "info") -> Event:
    return Event(_id(job, kind, key), job.uid, at, _ORDER[kind], level, "message", message)


def _id(job: Job, kind: str, key: str) -> str:
    return "ftevent-" + hashlib.sha256(f"{job.uid}\n{kind}\n{key}".encode()).hexdigest()[:24]


def _events(job: Job) -> Iterator[Event]:
    status, began = job.status, unix(job.created) or 0
    yield _event(job, "created", "", began, f"Created fine-tuning job: {job.id}")
    if status.started_at:
        named = job.request.get("training_file") or (job.spec.dataset.train.uri if job.spec is not None else "")
        yield _event(job, "validating", "", unix(status.started_at) or began, f"Validating training file: {named}")
    for condition in status.conditions:
        yield from _of_condition(job, condition, began)
    if status.queue is not None and status.queue.message:
        yield _event(job, "queued", status.queue.message, unix(status.queue.since) or began, f"Waiting: {status.queue.message}")
    for restart in status.restarts:
        message = f"Attempt {restart.attempt} ended: {restart.reason}{f': {restart.message}' if restart.message else ''}"
        yield _event(job, "restart", str(restart.attempt), unix(restart.time) or began, message, "warn")
    yield from _of_progress(job, began)


def _of_condition(job: Job, condition: Condition, began: int) -> Iterator[Event]:
    at, holds, key = unix(condition.last_transition_time) or began, condition.status == "True", condition.last_transition_time
    if condition.type in _TOLD and holds:
        yield _event(job, condition.type, key, at, _TOLD[condition.type])
    elif condition.type == "Suspended":
        told = f"The job is paused: {condition.message or condition.reason}" if holds else "The job goes on"
        yield _event(job, "Suspended", key, at, told)
    elif condition.type == "Succeeded" and holds:
        yield _event(job, "model", key, at, f"New fine-tuned model created: {model_name(job)}")
        yield _event(job, "end", key, at, "The job has successfully completed")
    elif condition.type == "Failed" and holds:
        if condition.reason == CANCELLED:
            yield _event(job, "end", key, at, "The job has been cancelled")
        else:
            yield _event(job, "end", key, at, f"The job failed: {condition.reason}: {condition.message}", "error")


def _of_progress(job: Job, began: int) -> Iterator[Event]:
    progress, checkpoint = job.status.progress, job.status.checkpoint
    if progress is not None and progress.step:
        values = {name: found for name, field in _METRICS.items() if (found := getattr(progress, field)) is not None}
        shown = [
            f"{label}={values[name]:.4g}"
            for name, label in (("train_loss", "training loss"), ("valid_loss", "validation loss"))
            if name in values
        ]
        message = f"Step {progress.step}/{progress.total_steps}" + (f": {', '.join(shown)}" if shown else "")
        data = json.dumps({"step": progress.step, "total_steps": progress.total_steps, **values})
        at = unix(progress.reported_at) or began
        key = f"{job.status.attempt}-{progress.step}"
        yield Event(_id(job, "step", key), job.uid, at, 100 + 2 * progress.step, "info", "metrics", message, data, progress.step)
    if checkpoint is not None and checkpoint.step:
        at = unix(checkpoint.saved_at) or (unix(progress.reported_at) if progress is not None else None) or began
        key, message = str(checkpoint.step), f"Checkpoint created at step {checkpoint.step}"
        data = json.dumps({"step": checkpoint.step})
        place = 101 + 2 * checkpoint.step
        yield Event(_id(job, "checkpoint", key), job.uid, at, place, "info", "checkpoint", message, data, checkpoint.step)


def checkpoint_of(job: Job, event: Event, point: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's event as OpenAI's object; `point` is what was told at that very step, which may be nothing."""
    return {
        "id": event.id.replace("ftevent-", "ftckpt_"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": event.created_at,
        "fine_tuned_model_checkpoint": f"{model_name(job)}:ckpt-step-{event.step}",
        "fine_tuning_job_id": job.id,
        "step_number": event.step,
        "metrics": {"step": event.step, **{name: point[name] for name in ("train_loss", "valid_loss") if name in point}},
    }


def table_of(points: list[Event]) -> str:
    """Step metrics as CSV; of a step that was done twice, after a restart, the later."""
    by_step = {event.step: json.loads(event.data) for event in points if event.type == "metrics" and event.data}
    lines = [",".join(COLUMNS)]
    for _, values in sorted(by_step.items(), key=lambda item: item[0] or 0):
        lines.append(",".join("" if values.get(name) is None else str(values[name]) for name in COLUMNS))
    return "\n".join(lines) + "\n"

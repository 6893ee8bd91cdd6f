"""What a written status says in Prometheus' terms. A status is written on condition, so that each transition counts once.

Knows nothing of a job but that.
"""

from __future__ import annotations

import contextlib
from typing import Any

from finetune_api.reasons import OTHER, known_reason
from finetune_api.status import FineTuneJobStatus

from .. import metrics
from ..model.times import parse_time

MOST_JOBS = 500
"""Jobs that train at the same time with gauges of their own; more have none."""
MOST_QUEUES = 500
"""Queues with counters of their own: a status, or a LocalQueue of a tenant's, may bring any name."""


class Telemetry:
    """Counts transitions, and keeps the gauges of the jobs that train now."""

    def __init__(self) -> None:
        self._training: dict[str, tuple[str, str]] = {}
        self._queues: set[str] = set()

    def wrote(self, job: dict[str, Any], before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
        """A job's status went from one to the other."""
        namespace, queue = job["metadata"]["namespace"], self._queue(before, after)
        if after.finished and not before.finished:
            ended = after.condition("Succeeded" if after.phase == "Succeeded" else "Failed")
            metrics.FINISHED.labels(result=after.phase, reason=known_reason(ended.reason if ended is not None else "")).inc()
        known = {(r.attempt, r.time) for r in before.restarts}
        for restart in after.restarts:
            if (restart.attempt, restart.time) not in known:
                metrics.RESTARTS.labels(cause=restart.cause).inc()
        _add(metrics.GPU_SECONDS.labels(namespace=namespace, queue=queue), after.usage.gpu_seconds - before.usage.gpu_seconds)
        _add(metrics.LOST_SECONDS.labels(namespace=namespace), after.usage.lost_seconds - before.usage.lost_seconds)
        _add(metrics.COST.labels(namespace=namespace, queue=queue), (after.usage.cost or 0.0) - (before.usage.cost or 0.0))
        if after.is_true("Admitted") and not before.is_true("Admitted"):
            waited = max(0, after.usage.queued_seconds - before.usage.queued_seconds)
            _add(metrics.QUEUED_SECONDS.labels(namespace=namespace, queue=queue), waited)
            metrics.ADMISSION_WAIT.labels(queue=queue).observe(waited)
        self._follow(job, after)

    def _queue(self, *statuses: FineTuneJobStatus) -> str:
        """The queue it was admitted to, as far as it is known."""
        found = [s.admission.queue for s in statuses if s.admission is not None and s.admission.queue]
        if not found:
            return ""
        if len(self._queues) < MOST_QUEUES:
            self._queues.add(found[-1])
        return found[-1] if found[-1] in self._queues else OTHER

    def _follow(self, job: dict[str, Any], status: FineTuneJobStatus) -> None:
        meta, progress = job["metadata"], status.progress
        if status.phase != "Training" or progress is None:
            self.forget(meta["uid"])
            return
        if meta["uid"] not in self._training and len(self._training) >= MOST_JOBS:
            return
        labels = self._training.setdefault(meta["uid"], (meta["namespace"], meta["name"]))
        metrics.TRAINING_STEP.labels(*labels).set(progress.step)
        metrics.TRAINING_TOTAL_STEPS.labels(*labels).set(progress.total_steps)
        if progress.loss is not None:
            metrics.TRAINING_LOSS.labels(*labels).set(progress.loss)
        if progress.tokens_per_second is not None:
            metrics.TOKENS_PER_SECOND.labels(*labels).set(progress.tokens_per_second)
        if (reported_at := parse_time(progress.reported_at)) is not None:
            metrics.REPORTED_AT.labels(*labels).set(reported_at.timestamp())

    def forget(self, uid: str) -> None:
        """The job does not train any more, or is gone."""
        labels = self._training.pop(uid, None)
        if labels is not None:
            for gauge in metrics.OF_TRAINING:
                with contextlib.suppress(KeyError):  # it was never set
                    gauge.remove(*labels)


def _add(counter: Any, amount: float) -> None:
    if amount > 0:  # a status that was wiped begins again at nothing
        counter.inc(amount)

"""A plan in the making: collects actions, conditions and events while the engine walks through the stages.

Knows nothing of what a stage is.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.base import shortened
from finetune_api.lenient import read_status
from finetune_api.scalars import printable
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase

from ...model.job import Observed
from ...model.times import parse_time, rfc3339
from ...resources.common import JobRef
from ...settings import Settings
from ..conditions import set_condition
from ..plan import Action, Event, Plan, WriteUrgency

_EVENT_LIMIT = 1000
RETRY_AFTER_LIMIT = 3600.0
"""Seconds of patience that a hub or server may ask for."""


class Draft:
    """Mutable within one reconcile call, and nowhere else."""

    def __init__(self, observed: Observed, settings: Settings) -> None:
        self.observed = observed
        self.settings = settings
        self.now = observed.now
        self.before, self.status = read_status(observed.job.get("status")), read_status(observed.job.get("status"))
        self.generation = int(observed.job["metadata"].get("generation", 0))
        self.actions: list[Action] = []
        self.events: list[Event] = []
        self.requeue: list[datetime] = []
        self.last_words = False
        """Something was learnt from a pod that may be gone in a moment: it is put on record at once."""
        self.place = ""
        """Kueue's Workload that the evaluation's Job is admitted by, where one keeps its place in line."""
        self.more_follows = False
        """The next step is near: it is put on record together with this one."""

    def job_ref(self, spec: FineTuneJobSpec) -> JobRef:
        """Identity and spec for the builders of manifests."""
        metadata = self.observed.job["metadata"]
        return JobRef(metadata["name"], metadata["namespace"], metadata["uid"], spec, tuple(self.status.models))

    def nodes(self, spec: FineTuneJobSpec) -> int:
        """Worker pods of the gang as it was admitted."""
        admission = self.status.admission
        return admission.nodes if admission is not None else spec.distribution.nodes

    def set(self, type_: ConditionType, status: Literal["True", "False", "Unknown"], reason: str, message: str = "") -> None:
        """Set a condition; its transition time moves only when its status changes. A change of it is an Event."""
        set_condition(self.status, type_, status, reason, message, now=self.now, generation=self.generation)

    def event(self, type_: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Tell the user; posted once however often this pass is repeated."""
        self.events.append(Event(type_, reason, printable(shortened(message, _EVENT_LIMIT))))

    def wait(self, seconds: float) -> None:
        """Look again after so many seconds, whatever happens."""
        self.requeue.append(self.now + timedelta(seconds=max(1.0, seconds)))

    def phase(self, phase: Phase) -> None:
        """Set the summary for people."""
        self.status.phase = phase

    def fail(self, reason: str, message: str) -> None:
        """End the job. A terminal state is terminal, whatever happens to the children later."""
        self.set("Running", "False", reason, message)
        self.set("Failed", "True", reason, message)
        self.event("Warning", reason, message)
        self.status.finished_at = rfc3339(self.now)
        self.status.retry_after = None
        self.status.queue = None
        self.phase("Failed")

    def succeed(self, reason: str, message: str, *, event: str) -> None:
        """End the job with its result."""
        self.set("Succeeded", "True", reason, message)
        self.event("Normal", event, message)
        self.status.finished_at = rfc3339(self.now)
        self.phase("Succeeded")

    def held_back(self) -> bool:
        """Whether the back-off is not over; then the job is looked at again when it is.

        Longer than the longest back-off it cannot last: a clock was set back, and must not hold the job up.
        """
        after = parse_time(self.status.retry_after)
        longest = timedelta(seconds=max(self.settings.backoff_limit_seconds, RETRY_AFTER_LIMIT))
        if after is None or not self.now < after <= self.now + longest:
            self.status.retry_after = None
            return False
        self.requeue.append(after)
        return True

    def backoff(self, retries: int) -> float:
        """Seconds before retry number `retries`, counted from 1: none before the first, then doubling."""
        if retries <= 1:
            return 0.0
        return min(self.settings.backoff_limit_seconds, self.settings.backoff_base_seconds * 2.0 ** min(retries - 2, 30))

    def _same_reason(self, before: Condition) -> Condition:
        now = next((c for c in self.status.conditions if c.type == before.type), before)
        return (
            now if before.type in ("Admitted", "QuotaReserved") and (now.status, now.reason) == (before.status, before.reason) else before
        )

    def _as_kueue_says(self) -> None:
        """What Admitted says, in the terms of Kueue's Workload (KEP-77): what reads those reads these."""
        now, before = self.status.condition("Admitted"), self.before.condition("Admitted")
        if now is None:
            return
        if now.status == "True":
            self.set("QuotaReserved", "True", "QuotaReserved", now.message)
            for type_ in ("Evicted", "Preempted"):
                if self.status.is_true(type_):
                    self.set(type_, "False", "QuotaReserved", "it was admitted again")
            return
        self.set("QuotaReserved", "False", "Pending", now.message)
        if before is not None and before.status == "True" and not self.status.is_true("Trained"):
            self.set("Evicted", "True", now.reason, now.message)
            if now.reason == "Preempted":
                self.set("Preempted", "True", "InClusterQueue", now.message)

    def _summarise(self) -> None:
        """Ready and Stalled, by which Flux and `kubectl wait` know an end (kstatus); they stand first and follow from the rest."""
        ended = self.status.condition("Succeeded" if self.status.phase == "Succeeded" else "Failed")
        if self.status.phase in ("Succeeded", "Failed") and ended is not None:
            self.set("Finished", "True", self.status.phase, ended.message)
            self.set("Ready", "True" if self.status.phase == "Succeeded" else "False", ended.reason, ended.message)
            if self.status.phase == "Failed":
                self.set("Stalled", "True", ended.reason, ended.message)
        else:
            self.set("Ready", "False", self.status.phase, "the job has not ended")
        summary = ("Ready", "Stalled")
        self.status.conditions.sort(key=lambda c: summary.index(c.type) if c.type in summary else len(summary))

    def _due(self, quiet: FineTuneJobStatus) -> WriteUrgency:
        if self.last_words or self.status.finished or self.status.is_true("Admitted") != self.before.is_true("Admitted"):
            return WriteUrgency.NOW
        if 0 < self.before.observed_generation < self.generation:  # whoever wrote the spec, and the scheduler, wait for this
            return WriteUrgency.NOW
        if self.status == quiet:
            return WriteUrgency.LATER
        return WriteUrgency.SOON if self.more_follows else WriteUrgency.NOW

    def plan(self) -> Plan[FineTuneJobStatus]:
        """The finished plan; without a status when nothing changed."""
        self._as_kueue_says()
        self._summarise()
        self.status.observed_generation = self.generation
        changed = self.status != self.before
        quiet = self.before.model_copy(update={"progress": self.status.progress, "checkpoint": self.status.checkpoint})
        if self.before.queue is not None and self.status.queue is not None:  # what it waits for changes all the time
            conditions = [self._same_reason(c) for c in self.before.conditions]
            quiet = quiet.model_copy(update={"queue": self.status.queue, "conditions": conditions})
        return Plan(
            actions=tuple(self.actions),
            events=tuple(dataclasses.replace(event, series=self.status.attempt) for event in self.events),
            status=self.status if changed else None,
            before=self.before,
            due=self._due(quiet),
            requeue_at=min(self.requeue) if self.requeue else None,
        )

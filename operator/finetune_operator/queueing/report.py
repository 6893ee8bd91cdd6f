"""PURE: what is told of a queue, from what was decided. Knows nothing of why."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from finetune_api.queue import FineTuneQueueStatus, FlavorUsage, Oldest
from finetune_api.status import Condition

from ..model.objects import Object
from ..model.queueing import Decisions, Queue, QueueReport, Snapshot, Workload
from ..model.times import parse_time, rfc3339
from .explain import unreadable
from .quota import counted


def queue_report(share: float, waiting: list[Workload], holding: list[Workload]) -> QueueReport:
    """Who waits in a queue, and what of it is held, by namespaces."""
    used: Counter[str] = Counter()
    serving: Counter[str] = Counter()
    by_namespace: Counter[str] = Counter()
    for workload in holding:
        if (allocation := workload.allocation) is not None:
            used[allocation.flavor] += allocation.total
            serving[allocation.flavor] += allocation.total if workload.serves else 0
            by_namespace[workload.namespace] += allocation.total
    oldest = min(waiting, key=lambda w: (w.waits_since, w.uid), default=None)
    return QueueReport(
        pending=len(waiting),
        admitted=sum(1 for w in holding if w.allocation is not None and not w.allocation.stopping),
        used=dict(used),
        serving=dict(serving),
        by_namespace=dict(by_namespace),
        share=round(share, 4),
        oldest=(oldest.label, oldest.waits_since) if oldest is not None else None,
    )


def queue_status(queue: Queue, raw: Object, snapshot: Snapshot, decisions: Decisions) -> FineTuneQueueStatus:
    """A queue's status from what was decided."""
    report, spec = decisions.queues[queue.name], queue.spec
    flavors = [
        FlavorUsage(
            name=f.name,
            nominal=f.nominal_quota,
            used=report.used.get(f.name, 0),
            borrowed=max(0, report.used.get(f.name, 0) - f.nominal_quota),
            serving=report.serving.get(f.name, 0),
        )
        for f in spec.flavors
    ]
    stamp = rfc3339(snapshot.now)
    since = parse_time(queue.history.updated_at) or snapshot.now
    reason, message = "Ready", "jobs are admitted"
    if queue.unreadable:
        reason, message = "Unreadable", unreadable(queue)
    elif spec.stop_policy != "None":
        reason, message = "Stopped", f"stopPolicy is {spec.stop_policy}"
    old: Object = next((c for c in (raw.get("status") or {}).get("conditions") or () if c.get("type") == "Active"), {})
    value: Literal["True", "False"] = "True" if reason == "Ready" else "False"
    active = Condition(
        type="Active",
        status=value,
        reason=reason,
        message=message,
        last_transition_time=old.get("lastTransitionTime", stamp) if old.get("status") == value else stamp,
        observed_generation=int(raw["metadata"].get("generation", 0)),
    )
    return FineTuneQueueStatus(
        conditions=[active],
        pending=report.pending,
        admitted=report.admitted,
        flavors=flavors,
        used=sum(f.used for f in flavors),
        nominal=sum(f.nominal for f in flavors),
        borrowed=sum(f.borrowed for f in flavors),
        serving=sum(f.serving for f in flavors),
        share=report.share,
        oldest_waiting=Oldest(job=report.oldest[0], since=rfc3339(report.oldest[1])) if report.oldest is not None else None,
        history=counted(queue.history, spec, report.by_namespace, since, snapshot.now, stamp),
    )

"""Where a gang stands that another scheduler decides about: its pods are made, and wait until that one lets them start.

Knows nothing of how that one decides.
"""

from __future__ import annotations

from typing import Any

from finetune_api.scalars import printable
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AdmissionStatus, QueueStatus

from ...model.job import PodView
from ...model.times import rfc3339
from ...resources.backends import local_queue, pod_group
from ..plan import Apply, Delete
from .admission import end_wait
from .draft import Draft
from .gang import create_missing, drop_stale, manifest_of
from .kueue import DEACTIVATED, Standing, conditions, standing
from .stages import LOOK_AGAIN
from .usage import workers


def admitted_externally(draft: Draft, spec: FineTuneJobSpec) -> bool:
    """Whether the back-end has admitted this attempt's gang, by what is on record. Makes the pods that it decides about."""
    status, backend = draft.status, draft.settings.queueing_backend.capitalize()
    if status.is_true("Admitted") and status.admission is not None and status.admission.attempt == status.attempt:
        return True
    status.admission = None
    draft.phase("Queued")
    if not drop_stale(draft, spec) or draft.held_back():
        return False
    if (known := status.condition("Admitted")) is not None and known.reason == DEACTIVATED:
        since = status.queue.since if status.queue is not None else rfc3339(draft.now)
        status.queue = QueueStatus(name=local_queue(spec), message=known.message, since=since)
        return False
    if moved := [p for p in workers(draft) if p.queue and p.queue != local_queue(spec) and not p.deleting and not p.node]:
        draft.actions.extend(Delete("Pod", p.name, p.uid) for p in moved)  # made again for the queue that the spec names now
        return False
    by_rank = {p.rank: p for p in workers(draft)}
    found = _standing(draft, spec, by_rank)
    if found.admitted:
        end_wait(draft)
        status.admission = AdmissionStatus(
            queue=found.queue,
            flavor=found.flavor,
            nodes=spec.distribution.nodes,
            attempt=status.attempt,
            admitted_at=rfc3339(draft.now),
        )
        draft.set("Admitted", "True", "Admitted", found.message)
        draft.event("Normal", "Admitted", f"attempt {status.attempt}: {found.message}")
        draft.phase("Starting")
        return False
    create_missing(draft, spec, by_rank)
    if backend == "Volcano" and draft.observed.group is None and (first := by_rank.get(0)) is not None:
        worker = manifest_of(draft, spec, 0)
        group = pod_group(draft.job_ref(spec), status.attempt, spec.distribution.nodes, (first.name, first.uid), worker)
        draft.actions.append(Apply(group))
    queue = local_queue(spec)
    since = status.queue.since if status.queue is not None else rfc3339(draft.now)
    status.queue = QueueStatus(name=queue, message=printable(found.message), since=since)
    if draft.before.queue is None:
        draft.event("Normal", "Queued", f"attempt {status.attempt} waits in {backend}'s queue {queue}")
    draft.set("Admitted", "False", found.reason, found.message)
    draft.wait(LOOK_AGAIN)
    return False


def _standing(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> Standing:
    queue, observed = local_queue(spec), draft.observed
    kueue = draft.settings.queueing_backend == "kueue"
    found = standing(observed.group, queue, observed.served) if kueue else _of_pod_group(observed.group, queue)
    if not found.admitted and any(p.node or p.ended for p in by_rank.values()):
        return Standing(True, "its pods were let through", found.queue or queue, found.flavor)
    return found


def _of_pod_group(group: dict[str, Any] | None, queue: str) -> Standing:
    """Volcano's PodGroup says what it waits for; that it is let through is seen by its pods."""
    waits = [c for c in conditions(group or {}).values() if c.get("type") == "Unschedulable" and c.get("status") == "True"]
    message = str(waits[0].get("message") or "") if waits else ""
    return Standing(False, message or f"waits in Volcano's queue {queue}", queue, reason="WaitsForVolcano")

"""Where a gang stands that another scheduler decides about: its pods are made, and wait until that one lets them start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.scalars import printable
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AdmissionStatus, QueueStatus

from ..resources.backends import local_queue, pod_group
from .admitted import end_wait
from .draft import MESSAGE_LIMIT, Draft
from .gang import create_missing, drop_stale, manifest_of
from .model import Apply, PodView, rfc3339
from .usage import workers

_LOOK_AGAIN = 10.0


@dataclass(frozen=True)
class Standing:
    """What the back-end says of a gang."""

    admitted: bool
    message: str
    queue: str | None = None
    flavour: str | None = None


def handed_over(draft: Draft, spec: FineTuneJobSpec) -> bool:
    """Whether the back-end has admitted this attempt's gang, by what is on record. Makes the pods that it decides about."""
    status, backend = draft.status, draft.settings.queueing_backend.capitalize()
    if status.is_true("Admitted") and status.admission is not None and status.admission.attempt == status.attempt:
        return True
    status.admission = None
    draft.phase("Queued")
    if not drop_stale(draft, spec) or draft.held_back():
        return False
    by_rank = {p.rank: p for p in workers(draft)}
    standing = _standing(draft, spec, by_rank)
    if standing.admitted:
        end_wait(draft)
        status.admission = AdmissionStatus(
            queue=standing.queue,
            flavour=standing.flavour,
            nodes=spec.distribution.nodes,
            attempt=status.attempt,
            admitted_at=rfc3339(draft.now),
        )
        draft.set("Admitted", "True", "Admitted", standing.message)
        draft.event("Normal", "Admitted", f"attempt {status.attempt}: {standing.message}")
        draft.phase("Starting")
        return False
    create_missing(draft, spec, by_rank)
    if backend == "Volcano" and draft.observed.group is None and (first := by_rank.get(0)) is not None:
        worker = manifest_of(draft, spec, 0)
        group = pod_group(draft.job_ref(spec), status.attempt, spec.distribution.nodes, (first.name, first.uid), worker)
        draft.actions.append(Apply(group))
    queue = local_queue(spec)
    since = status.queue.since if status.queue is not None else rfc3339(draft.now)
    status.queue = QueueStatus(name=queue, message=printable(standing.message[:MESSAGE_LIMIT]), since=since)
    if draft.before.queue is None:
        draft.event("Normal", "Queued", f"attempt {status.attempt} waits in {backend}'s queue {queue}")
    draft.set("Admitted", "False", f"WaitsFor{backend}", standing.message)
    draft.wait(_LOOK_AGAIN)
    return False


def _standing(draft: Draft, spec: FineTuneJobSpec, by_rank: dict[int, PodView]) -> Standing:
    queue, group = local_queue(spec), draft.observed.group
    kueue = draft.settings.queueing_backend == "kueue"
    found = (_of_workload if kueue else _of_pod_group)(group, queue)
    if not found.admitted and any(p.node or p.phase in ("Succeeded", "Failed") for p in by_rank.values()):
        return Standing(True, "its pods were let through", found.queue or queue, found.flavour)
    return found


def _conditions(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c.get("type", ""): c for c in (group.get("status") or {}).get("conditions") or ()}


def _of_workload(workload: dict[str, Any] | None, queue: str) -> Standing:
    """Kueue's Workload: https://kueue.sigs.k8s.io/docs/concepts/workload/"""
    if workload is None:
        return Standing(
            False, f"Kueue has not taken the gang over yet; is there a LocalQueue {queue}, and does Kueue manage this namespace?"
        )
    admission = (workload.get("status") or {}).get("admission") or {}
    flavours = {f for pods in admission.get("podSetAssignments") or () for f in (pods.get("flavors") or {}).values()}
    conditions = _conditions(workload)
    if (conditions.get("Admitted") or {}).get("status") == "True":
        cluster_queue = admission.get("clusterQueue")
        where = f"ClusterQueue {cluster_queue}" if cluster_queue else f"queue {queue}"
        named = ", ".join(sorted(flavours)) or None
        return Standing(True, f"admitted by Kueue to {where}{f', flavour {named}' if named else ''}", cluster_queue, named)
    if (workload.get("spec") or {}).get("active") is False:
        return Standing(False, "Kueue has deactivated the Workload: set its spec.active to true, or suspend and resume the job")
    if (conditions.get("QuotaReserved") or {}).get("status") == "True":
        return Standing(False, "Kueue has reserved the quota; an admission check is not done yet")
    waits = conditions.get("QuotaReserved") or conditions.get("Evicted") or {}
    return Standing(False, str(waits.get("message") or f"waits in Kueue's LocalQueue {queue}"))


def _of_pod_group(group: dict[str, Any] | None, queue: str) -> Standing:
    """Volcano's PodGroup says what it waits for; that it is let through is seen by its pods."""
    waits = [c for c in _conditions(group or {}).values() if c.get("type") == "Unschedulable" and c.get("status") == "True"]
    message = str(waits[0].get("message") or "") if waits else ""
    return Standing(False, message or f"waits in Volcano's queue {queue}", queue)

"""What Kueue says, in its Workloads and on the pods that it takes away, and the evaluation's place in its line.

Kueue's side: https://kueue.sigs.k8s.io/docs/concepts/workload/ and https://kueue.sigs.k8s.io/docs/concepts/preemption/
Knows nothing of how it is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune_api.scalars import seconds
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

from ...model.children import owner_uid
from ...model.job import PodView
from ...resources.backends import kept_place, pod_sets
from ...resources.stage import stage_job
from ...settings import Settings
from ..plan import Create, Delete, Patch
from .draft import Draft
from .failures import Failure
from .usage import workers

DEACTIVATED = "Deactivated"
"""Reason of Admitted when somebody has taken the running gang's Workload out of Kueue's queue: it does not come back by itself."""
OUT_OF_SYNC = "OutOfSync"
"""Reason of a Workload that Kueue does not take for the Job that names it"""
_INADMISSIBLE = "Inadmissible"
_NEAR_END_SECONDS = 30.0
"""So long before its training ends an evaluation stands in line: what the gang holds is given to the next in line at once."""


@dataclass(frozen=True)
class Standing:
    """What the back-end says of a gang or a stage."""

    admitted: bool
    message: str
    queue: str | None = None
    flavor: str | None = None
    reason: str = "WaitsForKueue"
    """Of the condition, while it waits."""


def conditions(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By type."""
    return {c.get("type", ""): c for c in (group.get("status") or {}).get("conditions") or ()}


def _is(found: dict[str, dict[str, Any]], type_: str) -> bool:
    return (found.get(type_) or {}).get("status") == "True"


def finished_as(workload: dict[str, Any] | None) -> str:
    """The reason why a Workload counts as finished; empty while it does not."""
    found = conditions(workload or {})
    return str(found["Finished"].get("reason") or "") if _is(found, "Finished") else ""


def standing(workload: dict[str, Any] | None, queue: str, served: str) -> Standing:
    """Where a Workload stands, in Kueue's words and with what to do about it."""
    if not served:
        return Standing(False, "the API server knows no Workloads of Kueue: install Kueue, or set queueing.backend in the chart's values")
    if workload is None:
        text = f"Kueue has not taken it over yet; is there a LocalQueue {queue}, and does Kueue manage plain pods in this namespace?"
        return Standing(False, text)
    admission = (workload.get("status") or {}).get("admission") or {}
    flavors = {f for pods in admission.get("podSetAssignments") or () for f in (pods.get("flavors") or {}).values()}
    found = conditions(workload)
    if _is(found, "Admitted") and not _is(found, "Evicted"):
        cluster_queue = admission.get("clusterQueue")
        where = f"ClusterQueue {cluster_queue}" if cluster_queue else f"queue {queue}"
        named = ", ".join(sorted(flavors)) or None
        return Standing(True, f"admitted by Kueue to {where}{f', flavor {named}' if named else ''}", cluster_queue, named)
    name = (workload.get("metadata") or {}).get("name", "")
    if (workload.get("spec") or {}).get("active") is False:
        why = str((found.get("Evicted") or {}).get("message") or "somebody has set spec.active to false")
        text = f"Kueue's Workload {name} is inactive ({why}): it waits until its spec.active is true"
        return Standing(False, text, reason="WorkloadInactive")
    waits = found.get("QuotaReserved") or {}
    message = str(waits.get("message") or (found.get("Evicted") or {}).get("message") or f"waits in Kueue's LocalQueue {queue}")
    if waits.get("status") == "True":
        return Standing(False, "Kueue has reserved the quota; an admission check is not done yet")
    if waits.get("reason") == _INADMISSIBLE:
        return Standing(False, f"{message}{_what_to_do(message)}", reason=_INADMISSIBLE)
    return Standing(False, message)


def _what_to_do(message: str) -> str:
    if re.match(r"LocalQueue .* (doesn't exist|is terminating or missing)", message):
        return ": make it in the job's namespace, or set scheduling.queue to one that is there"
    if re.match(r"ClusterQueue .* (doesn't exist|is terminating or missing)", message):
        return ": its LocalQueue points to nothing; an administrator has to make it"
    if re.match(r"(Local|Cluster)Queue .* is (inactive|stopped)", message):
        return ": an administrator has stopped it (spec.stopPolicy) or something that it refers to is missing; the job goes on when it is active"
    return ""


def preemptor_uid(message: str) -> str | None:
    """UID of the Workload that takes the place, from Kueue's message."""
    found = re.search(r"accommodate a workload \(UID: ([0-9a-f-]{36})", message)
    return found[1] if found else None


def taken_away(draft: Draft, pods: list[PodView]) -> Failure | None:
    """That Kueue has taken the gang's pods away, why, and for whom. It says why before it deletes them: then they have not begun to save."""
    gone = [p for p in sorted(pods, key=lambda p: p.rank) if p.eviction and (p.deleting or p.phase == "Failed")]
    pod = gone[0] if gone else None
    if pod is None:
        return None
    favour = f" in favor of Workload {draft.observed.preemptor}" if draft.observed.preemptor else ""
    message = f"evicted by Kueue ({pod.eviction}){favour}: {pod.eviction_message or 'no message'}"
    return Failure("Disruption", pod.eviction, message, pod.name, pod.node)


# the evaluation's place in line


def keeps_place(spec: FineTuneJobSpec, settings: Settings) -> bool:
    """Whether the evaluation waits for a GPU in Kueue's line."""
    return settings.queueing_backend == "kueue" and spec.evaluation is not None and spec.distribution.gpus_per_node > 0


def _is_near_end(status: FineTuneJobStatus) -> bool:
    progress = status.progress
    if not status.is_true("Running") or progress is None or not progress.total_steps:
        return False
    try:
        left = seconds(progress.eta) if progress.eta else float("inf")
    except ValueError:
        return False
    return progress.step >= progress.total_steps or left <= _NEAR_END_SECONDS


def asks_for_place(spec: FineTuneJobSpec | None, status: FineTuneJobStatus, settings: Settings) -> bool:
    """Whether the next decision depends on the Workload that keeps the evaluation's place."""
    if spec is None or not keeps_place(spec, settings) or status.is_true("Evaluated"):
        return False
    if status.phase in ("Queued", "Starting") or status.is_true("Trained") or _is_near_end(status):
        return True
    return status.phase in ("Suspended", "Failed") and status.condition("Admitted") is not None


def keep_place(draft: Draft, spec: FineTuneJobSpec) -> None:
    """Make, open and take away the Workload by which an evaluation is admitted before all that came after its training.

    Kueue orders by priority and then by age, so the evaluation's Workload is made with the gang's: inactive, which holds
    nothing. It is opened just before training ends. Nobody looks after an admitted Workload without a Job, so one that
    loses its quota again, its Job, or its training is deleted.
    """
    status, observed = draft.status, draft.observed
    if not observed.place_seen or not keeps_place(spec, draft.settings):
        return
    manifest, place = stage_job(draft.job_ref(spec), draft.settings, "evaluate", 0), observed.place
    name, retry = manifest["metadata"]["name"], status.stages.get("evaluate")
    job = next((j for j in observed.jobs if j.name == name and not j.deleting), None)
    ended = status.finished or status.is_true("Suspended")
    if place is None:
        gang = workers(draft)
        if not ended and retry is None and not status.is_true("Trained") and len(gang) == draft.nodes(spec):
            draft.actions.append(Create(kept_place(draft.job_ref(spec), manifest, gang[0].priority, observed.served)))
        return
    owner, found = owner_uid(place), conditions(place)
    if job is not None and owner in ("", job.uid):
        return  # Kueue looks after both
    opened = (place.get("spec") or {}).get("active") is not False
    wanted = not ended and (retry is None or not retry.tries) and (status.is_true("Trained") or _is_near_end(status))
    evicted = _is(found, "QuotaReserved") and _is(found, "Evicted")
    if owner or evicted or _is(found, "Finished") or status.finished or (opened and not wanted):
        draft.actions.append(Delete("Workload", name, place["metadata"]["uid"]))
        return
    draft.place = name
    if wanted and not opened:
        draft.actions.append(Patch(observed.served, name, {"spec": {"active": True, "podSets": pod_sets(manifest)}}))

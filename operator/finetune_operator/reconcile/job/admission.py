"""Where a job stands in its queue: what the scheduler decided becomes its condition Admitted, its place, and its right to pods.

Knows nothing of how that one decides.
"""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import AdmissionStatus, QueueStatus, TopologyDomain

from ...model.queueing import IMPLICIT, RECOVERED, Admission, Decision
from ...model.times import parse_time, rfc3339
from ...model.workload import sealed_admission
from .draft import Draft
from .failures import Failure
from .gang import next_attempt, release
from .usage import estimate, workers


def admitted(draft: Draft, spec: FineTuneJobSpec) -> bool:
    """Whether the gang may have its GPUs, by what is on record. A decision is put on record first and acted on in the next pass."""
    decision = draft.observed.decision
    if draft.status.is_true("Admitted"):
        if decision is not None and decision.action == "preempt":
            _give_way(draft, spec, decision)
            return False
        if decision is not None and decision.action == "resize" and decision.admission is not None:
            _resize(draft, spec, decision.admission, decision.message)
            return False
        return True
    if draft.status.condition("Admitted") is None and _is_recovered(draft):
        return False
    draft.phase("Queued")
    if not release(draft) or draft.held_back() or decision is None:
        return False
    if decision.action == "admit" and decision.admission is not None:
        _admit(draft, spec, decision.admission, decision.message)
    elif decision.action == "wait":
        _wait(draft, decision)
    return False


def _is_recovered(draft: Draft) -> bool:
    """Whether a gang runs that the status does not know, and goes on: somebody wiped it, and the pods bear what they were admitted to.

    Only with the operator's seal, and when the admission loop has found that quota has room for it; it is waited for.
    """
    sealed, decision = sealed_admission(workers(draft), draft.observed.job["metadata"]["uid"], draft.settings), draft.observed.decision
    if sealed is None or (decision is not None and decision.action in ("wait", "refuse")):
        return False
    if decision is None or decision.reason != RECOVERED:
        draft.wait(1)
        return True
    draft.status.admission = sealed
    draft.set("Admitted", "True", RECOVERED, "the gang was found running, and keeps what it was admitted to")
    return True


def _admit(draft: Draft, spec: FineTuneJobSpec, admission: Admission, message: str) -> None:
    status = draft.status
    if not fit_plan(draft, admission.pods * max(1, spec.distribution.gpus_per_node)):
        return
    end_wait(draft)
    status.admission = _on_record(draft, admission)
    draft.set("Admitted", "True", "Admitted" if admission.queue != IMPLICIT else "NoQueue", message)
    draft.event("Normal", "Admitted", message)
    draft.phase("Starting")


def end_wait(draft: Draft) -> None:
    """The job waits no longer; the time that it did is on its account."""
    status = draft.status
    if status.queue is not None and (since := parse_time(status.queue.since)) is not None:
        status.usage.queued_seconds += max(0, round((draft.now - since).total_seconds()))
    status.queue = None


def _on_record(draft: Draft, admission: Admission) -> AdmissionStatus:
    duration, cost = estimate(draft.status.plan, admission.teraflops, admission.price_per_hour)
    return AdmissionStatus(
        estimated_duration=duration,
        estimated_cost=cost,
        queue=admission.queue or None,
        flavor=admission.flavor or None,
        nodes=admission.pods,
        node_labels=dict(admission.node_labels),
        tolerations=list(admission.tolerations),
        topology=TopologyDomain(key=admission.topology[0], value=admission.topology[1]) if admission.topology is not None else None,
        price_per_hour=admission.price_per_hour,
        planned_nodes=[node for node, pods in admission.place for _ in range(pods)],
        attempt=draft.status.attempt,
        admitted_at=rfc3339(draft.now),
    )


def fit_plan(draft: Draft, world_size: int) -> bool:
    """The plan for so many processes: the same global batch."""
    plan = draft.status.plan
    if plan is None or plan.world_size == world_size:
        return True
    try:
        draft.status.plan = plan.spread_over(world_size)
    except ValueError as failure:
        draft.fail("PlanMismatch", str(failure))
        return False
    return True


def _wait(draft: Draft, decision: Decision) -> None:
    status = draft.status
    since = status.queue.since if status.queue is not None else rfc3339(draft.now)
    place = f"position {decision.position}" + (f" in queue {decision.queue}" if decision.queue else "") + ": " if decision.position else ""
    status.queue = QueueStatus(
        name=decision.queue or None, position=decision.position or None, message=place + decision.message, since=since
    )
    if draft.before.queue is None:
        draft.more_follows = True
        draft.event("Normal", "Queued", place + decision.message)
    draft.set("Admitted", "False", decision.reason, decision.message)


def _give_way(draft: Draft, spec: FineTuneJobSpec, decision: Decision) -> None:
    status = draft.status
    if workers(draft):
        next_attempt(draft, spec, Failure("Stopped", "Preempted", decision.message, ""), decision.message)
        status.retry_after = None
    draft.set("Admitted", "False", "Preempted", decision.message)
    status.queue = QueueStatus(name=decision.queue or None, message=decision.message, since=rfc3339(draft.now))
    draft.event("Normal", "Preempted", decision.message)
    draft.phase("Queued")


def _resize(draft: Draft, spec: FineTuneJobSpec, admission: Admission, message: str) -> None:
    if workers(draft):
        next_attempt(draft, spec, Failure("Stopped", "Resized", message, ""), message)
        draft.status.retry_after = None
    if fit_plan(draft, admission.pods * max(1, spec.distribution.gpus_per_node)):
        draft.status.admission = _on_record(draft, admission)

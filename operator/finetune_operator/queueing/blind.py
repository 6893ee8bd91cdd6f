"""Where nothing is counted: everybody is admitted (queueing.backend none), or nobody, since what would have to be counted is not seen.

Knows nothing of quota and nodes.
"""

from __future__ import annotations

from collections.abc import Callable

from ..model.queueing import Admission, Decision, Decisions, Snapshot, Workload
from . import explain

FORBIDDEN = "RightsMissing"


def admit_all(snapshot: Snapshot) -> Decisions:
    """Every gang starts at once, with all its pods; the cluster's scheduler finds it nodes, or not."""

    def decided(workload: Workload) -> Decision:
        admission = Admission(queue="", flavor="", pods=workload.request.pods[0])
        return Decision(action="admit", reason="NoQueue", message=explain.granted(workload, admission), admission=admission)

    return _all(snapshot, decided)


def admit_none(snapshot: Snapshot) -> Decisions:
    """Every gang waits; those that run go on."""
    message = missing_rights(snapshot.forbidden)
    return _all(snapshot, lambda workload: Decision(action="wait", reason=FORBIDDEN, message=message, queue=workload.queue or ""))


def missing_rights(forbidden: tuple[str, ...]) -> str:
    """What follows from them, and what to do."""
    return (
        f"the operator may not list {', '.join(forbidden)}, and gives away nothing that it cannot count: its service account "
        "needs that right on the whole cluster (chart value rbac.queueing), or queueing.backend none, which starts jobs at once"
    )


def _all(snapshot: Snapshot, decided: Callable[[Workload], Decision]) -> Decisions:
    jobs: dict[str, Decision] = {}
    for workload in snapshot.workloads:
        if workload.allocation is None and workload.waits:
            jobs[workload.uid] = decided(workload)
        elif workload.allocation is not None and not workload.allocation.stopping:
            jobs[workload.uid] = Decision(action="keep", queue=workload.allocation.queue)
        elif workload.waits:
            jobs[workload.uid] = Decision(action="wait", reason="Stopping", message="its pods still save and end")
    return Decisions(jobs=jobs)

"""What an endpoint holds of a FineTuneQueue and what it wants of it, in the queue's terms. Pure. Knows nothing of quota.

The record is `status.admission`. Where it is not there (a status that was wiped, or the first queue of a cluster), the replicas that run
are what it holds: an endpoint is never taken down for want of a record. Whoever may make pods could add to them, up to `spec.replicas`;
the same pods without the label would be counted by no queue at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from finetune_api.endpoint import EndpointAdmission, FineTuneEndpointSpec, FineTuneEndpointStatus

from .objects import Object
from .queueing import IMPLICIT, Allocation, Request, Workload
from .times import parse_time
from .workload import per_pod_of

ADMITTED = "Admitted"
"""The condition by which an endpoint says that it waits, and since when: before, nothing is decided about what it wants."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Of one endpoint."""

    held: Workload | None = None
    wanted: Workload | None = None
    """Replicas besides; all of them where it `moves`."""
    asks: bool = False
    """It has said that it waits for these."""
    moves: bool = False
    """To another queue or kind of GPU, or to a size of which what it holds is not enough for one."""
    holding: int = 0
    """Pods that have not ended."""


def wanted_uid(raw: Object) -> str:
    """What is decided about replicas besides is decided about one generation of the spec."""
    return f"{raw['metadata']['uid']}/{raw['metadata'].get('generation', 0)}"


def carried(admission: EndpointAdmission, spec: FineTuneEndpointSpec) -> int:
    """Replicas of the present size that have room in what it was admitted to."""
    return admission.replicas * admission.gpus_per_replica // max(1, spec.gpus_per_replica)


def demand_of(
    raw: Object,
    spec: FineTuneEndpointSpec,
    status: FineTuneEndpointStatus,
    *,
    pods: int,
    bound: tuple[tuple[str, int], ...] = (),
    queue: str,
    known: Callable[[str, str], bool],
    priority: int,
    now: datetime,
) -> Demand:
    """`pods`: those that have not ended. `bound`: (node, pods) of those that have one. `queue`: where it belongs now.
    `known`: whether there is such a queue with such a flavor.
    """
    meta, admission = raw["metadata"], status.admission
    resource, gpus = spec.resources.gpu_resource_name, spec.gpus_per_replica
    if admission is None and pods and spec.replicas:
        admission = EndpointAdmission(replicas=min(pods, spec.replicas), gpus_per_replica=gpus, resource_name=resource)
    said = status.condition(ADMITTED)
    since = (parse_time(said.last_transition_time) if said is not None and said.status == "False" else None) or now

    def workload(uid: str, request: Request, allocation: Allocation | None = None) -> Workload:
        return Workload(
            uid=uid,
            namespace=meta["namespace"],
            name=meta["name"],
            queue=spec.scheduling.queue,
            priority=priority,
            since=since,
            waits_since=since,
            request=request,
            waits=allocation is None,
            allocation=allocation,
            serves=True,
        )

    def request(resource: str, units: int, replicas: tuple[int, ...], flavor: str = "") -> Request:
        return Request(
            resource=resource,
            units=units,
            pods=replicas,
            per_pod=tuple(sorted({**per_pod_of(spec.resources, 0), resource: units}.items())),
            selector=tuple(sorted(spec.scheduling.node_selector.items())),
            tolerations=tuple((t.key, t.operator, t.value, t.effect) for t in spec.scheduling.tolerations),
            flavor=flavor,
            quota_alone=True,
        )

    held, there, moves, has, flavor = None, True, False, 0, ""
    if admission is not None and admission.replicas:
        count = admission.replicas + (pods > admission.replicas)  # one more while they are replaced
        allocation = Allocation(
            queue=admission.queue or IMPLICIT,
            flavor=admission.flavor or "",
            pods=count,
            units=admission.gpus_per_replica,
            since=now,
            bound=bound,
        )
        held = workload(meta["uid"], request(admission.resource_name, admission.gpus_per_replica, (count,)), allocation)
        selector, there = spec.scheduling.node_selector, known(allocation.queue, allocation.flavor)
        elsewhere = any(selector.get(key, value) != value for key, value in admission.node_labels.items())
        moves = admission.resource_name != resource or (there and (elsewhere or allocation.queue != queue)) or not carried(admission, spec)
        has, flavor = (0, "") if moves else (carried(admission, spec), allocation.flavor)
    fewest = min(spec.replicas, admission.replicas if moves and admission is not None else 1)  # none that runs is given up
    missing = 0 if meta.get("deletionTimestamp") else spec.replicas - has
    wanted = None
    if missing > 0:
        wanted = workload(wanted_uid(raw), request(resource, gpus, tuple(range(missing, max(1, min(fewest, missing)) - 1, -1)), flavor))
    # where what it holds counts goes on record before
    asks = there and said is not None and said.status == "False"
    return Demand(held=held, wanted=wanted, asks=asks, moves=moves, holding=pods)

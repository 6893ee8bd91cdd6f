"""What an endpoint may hold of its FineTuneQueue: from what is on record and what was decided to what goes on record. Pure.

Replicas follow the record, not the decision: what is started is counted by whoever looks, also after this operator is gone.
Knows nothing of quota, nor of which version answers.
"""

from __future__ import annotations

from finetune_api.endpoint import EndpointAdmission, FineTuneEndpointSpec, FineTuneEndpointStatus

from ...model.endpoint import ObservedEndpoint
from ...model.endpoint_demand import ADMITTED, carried
from ...model.queueing import Admission
from .found import Said


def replicas(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> int | None:
    """Replicas that its Deployment may have now; None: it stays as it is."""
    if observed.room is None or spec.replicas == 0:
        return spec.replicas
    on = observed.status.admission
    if on is None or observed.room.moves or on.gpus_per_replica != spec.gpus_per_replica:
        return None
    return min(spec.replicas, on.replicas)


def admission(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> EndpointAdmission | None:
    """What is to be on record."""
    room, on = observed.room, observed.status.admission
    if room is None:
        return None
    if room.held is not None and room.held.admission is not None:  # where what it holds counts now
        size = on or EndpointAdmission(replicas=room.held.admission.pods, gpus_per_replica=spec.gpus_per_replica)
        kind = {"gpus_per_replica": size.gpus_per_replica, "resource_name": size.resource_name or spec.resources.gpu_resource_name}
        on = _of(room.held.admission, spec, size.replicas).model_copy(update=kind)
    granted = room.wanted.admission if room.wanted is not None and room.wanted.action == "admit" else None
    if on is not None and not room.moves and (room.wanted is not None or not room.wants):
        # of another size all at once, with what is granted: none is taken away in between
        on = on.model_copy(update={"replicas": carried(on, spec), "gpus_per_replica": spec.gpus_per_replica})
    if granted is not None:
        on = _of(granted, spec, granted.pods + (on.replicas if on is not None and not room.moves else 0))
    if on is not None and on.replicas > spec.replicas and not room.moves:
        on = on.model_copy(update={"replicas": max(spec.replicas, min(on.replicas, room.holding))})
    return on


def _of(granted: Admission, spec: FineTuneEndpointSpec, replicas: int) -> EndpointAdmission:
    return EndpointAdmission(
        queue=granted.queue or None,
        flavor=granted.flavor or None,
        replicas=replicas,
        gpus_per_replica=spec.gpus_per_replica,
        resource_name=spec.resources.gpu_resource_name,
        node_labels=dict(granted.node_labels),
        tolerations=list(granted.tolerations),
    )


def expected(observed: ObservedEndpoint, spec: FineTuneEndpointSpec) -> int:
    """Pods that are to run now; beside replicas that others run, one."""
    if spec.external is not None:
        return 1
    on = observed.status.admission
    return spec.replicas if observed.room is None else min(spec.replicas, on.replicas if on is not None else 0)


def without_condition(status: FineTuneEndpointStatus) -> FineTuneEndpointStatus:
    """No queue has a say."""
    return status.model_copy(update={"conditions": [c for c in status.conditions if c.type != ADMITTED]})


def without_asking(status: FineTuneEndpointStatus) -> FineTuneEndpointStatus:
    """It cannot be made as it is: nothing is to be kept for it."""
    said = status.condition(ADMITTED)
    return without_condition(status) if said is not None and said.status == "False" else status


def said(observed: ObservedEndpoint, on: EndpointAdmission | None, spec: FineTuneEndpointSpec) -> Said | None:
    """Whether its queue has room for all replicas, and else what it waits for. `on`: what goes on record. None where no queue is asked."""
    if (room := observed.room) is None:
        return None
    granted = room.wanted.admission.pods if room.wanted is not None and room.wanted.admission is not None else 0
    has = spec.replicas - room.wants + granted
    if has >= spec.replicas:
        where = f" (queue {on.queue}, flavor {on.flavor})" if on is not None and on.queue else ""
        gpus = f" with {has * spec.gpus_per_replica} {spec.resources.gpu_resource_name}" if has else ""
        return Said(ADMITTED, "True", "Admitted", f"{has} of {spec.replicas} replicas{gpus}{where}")
    before = observed.status.condition(ADMITTED)
    if room.wanted is None and before is not None and before.status == "False":
        return Said(ADMITTED, "False", before.reason, before.message)
    runs = f"{on.replicas} run as they are meanwhile" if on is not None and room.moves else f"{has} of {spec.replicas} replicas may run"
    if room.wanted is None or room.wanted.action != "wait":
        return Said(ADMITTED, "False", "Pending", f"{runs}; the queue has not decided about the others yet")
    where = f"queue {room.wanted.queue}: " if room.wanted.queue else ""
    return Said(ADMITTED, "False", room.wanted.reason, f"{runs}; {where}{room.wanted.message}")

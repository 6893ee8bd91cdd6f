"""PURE: raw API objects -> what the queue sees of them. Knows nothing of quota and nodes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal

from finetune_api import names
from finetune_api.queue import Flavor
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.run import Resources
from finetune_api.status import AdmissionStatus

from ..settings import Settings
from .job import PodView
from .nodes import amount
from .objects import Object, as_object
from .queueing import Allocation, Amounts, Request, Workload
from .seal import is_sealed
from .times import parse_time

_EPOCH = datetime.fromtimestamp(0, UTC)


def per_pod_of(resources: Resources, gpus: int) -> dict[str, int]:
    """What one pod with so many GPUs requests."""
    per_pod: dict[str, int] = {}
    for name in ("cpu", "memory"):
        wanted = getattr(resources.requests, name) or getattr(resources.limits, name)
        if wanted is not None:
            per_pod[name] = amount(name, wanted)
    if gpus:
        per_pod[resources.gpu_resource_name] = gpus
    return per_pod


def request_of(spec: FineTuneJobSpec) -> Request:
    """What a job's gang needs."""
    distribution, resources = spec.distribution, spec.resources
    gpus = distribution.gpus_per_node
    per_pod = per_pod_of(resources, gpus)
    fewest = distribution.min_nodes or distribution.nodes
    batch = spec.tuning.hyperparameters.global_batch_size
    sizes = [n for n in range(distribution.nodes, fewest - 1, -1) if batch % (n * max(1, gpus)) == 0]
    return Request(
        resource=resources.gpu_resource_name if gpus else "cpu",
        units=gpus or int((Decimal(per_pod.get("cpu", 0)) / 1000).to_integral_value(ROUND_CEILING)),
        pods=tuple(sizes) or (distribution.nodes,),
        per_pod=tuple(sorted(per_pod.items())),
        selector=tuple(sorted(spec.scheduling.node_selector.items())),
        tolerations=tuple((t.key, t.operator, t.value, t.effect) for t in spec.scheduling.tolerations),
        topology_key=spec.scheduling.topology_key or "",
    )


def _evaluation_request(request: Request, settings: Settings) -> Request:
    per_pod = {request.resource: 1, "cpu": amount("cpu", settings.stage_cpu), "memory": amount("memory", settings.stage_memory)}
    return Request(
        resource=request.resource,
        units=1,
        pods=(1,),
        per_pod=tuple(sorted(per_pod.items())),
        selector=request.selector,
        tolerations=request.tolerations,
    )


def has_ended(raw: Object) -> bool:
    """Whether a job's end is on record."""
    return bool(as_object(raw.get("status")).get("finishedAt"))


def is_still(raw: Object) -> bool:
    """Whether a job looks the same at any time: it is not held back until some time."""
    return not as_object(raw.get("status")).get("retryAfter")


def priority_class_of(raw: Object) -> str | None:
    """The priority class that a job names; its spec need not be valid."""
    name = as_object(as_object(raw.get("spec")).get("scheduling")).get("priorityClassName")
    return name if isinstance(name, str) else None


def workload_of(
    raw: Object,
    spec: FineTuneJobSpec,
    request: Request,
    pods: Iterable[PodView],
    priority: int,
    settings: Settings,
    now: datetime,
    *,
    ready: bool = False,
) -> Workload:
    """A job with what it holds. `pods`: its workers, and those of its evaluation. `ready`: its data is, not yet on record."""
    meta, status = raw["metadata"], as_object(raw.get("status"))
    conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or () if isinstance(c, dict)}

    def is_true(type_: str) -> bool:
        return conditions.get(type_) == "True"

    finished, trained, admitted = is_true("Succeeded") or is_true("Failed"), is_true("Trained"), is_true("Admitted")
    suspended = spec.run_policy.suspend or is_true("Suspended")
    admission = as_object(status.get("admission"))
    alive = [p for p in pods if not p.ended]
    gang = [p for p in alive if p.is_worker]
    evaluation = [p for p in alive if p.job_uid] if spec.distribution.gpus_per_node > 0 else []
    evaluates = (
        trained and not finished and spec.evaluation is not None and not is_true("Evaluated") and spec.distribution.gpus_per_node > 0
    )
    deleting = bool(meta.get("deletionTimestamp"))
    over = finished or suspended or deleting
    keeps = admitted and not over
    recovers = sealed_admission(gang, meta["uid"], settings) if "Admitted" not in conditions and not over else None
    allocation = None
    if keeps and evaluates and not gang:
        request = _evaluation_request(request, settings)
        allocation = _allocation(admission, 1, request, evaluation, raw, now, stopping=False)
    elif keeps and not trained:
        allocation = _allocation(admission, int(admission.get("nodes") or request.pods[0]), request, gang, raw, now, stopping=False)
    elif recovers is not None:
        allocation = _allocation(recovers.to_wire(), recovers.nodes, request, gang, raw, now, stopping=False)
    elif gang:
        allocation = _allocation(admission, len(gang), request, gang, raw, now, stopping=True)
    elif evaluation:
        request = _evaluation_request(request, settings)
        allocation = _allocation(admission, len(evaluation), request, evaluation, raw, now, stopping=True)
    retry_after = parse_time(status.get("retryAfter"))
    waiting = as_object(status.get("queue"))
    created = parse_time(meta.get("creationTimestamp")) or _EPOCH
    return Workload(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        queue=spec.scheduling.queue,
        user=str(as_object(meta.get("annotations")).get(names.ANNOTATION_CREATED_BY) or ""),
        priority=priority,
        since=created,
        waits_since=parse_time(waiting.get("since")) or now,
        request=request,
        waits=(ready or is_true("DataReady"))
        and not (trained or finished or suspended or admitted or deleting)
        and (retry_after is None or retry_after <= now),
        allocation=allocation,
        has_run=bool(admission or as_object(status.get("usage")).get("gpuSeconds")),
        recovers=recovers is not None,
    )


def left_behind(
    uid: str,
    pods: Iterable[PodView],
    requests: Mapping[str, Amounts],
    flavors: Mapping[tuple[str, str], Flavor],
    settings: Settings,
    now: datetime,
) -> Workload | None:
    """A job that nobody saw go, by the workers that it has left; None where they hold nothing of a queue, or not by the operator's word.

    `requests`: by the pod's UID. `flavors`: by the names of queue and flavor.
    """
    alive = [pod for pod in pods if not pod.ended]
    admission = sealed_admission(alive, uid, settings, leaving=True)
    per_pod = next((requests[pod.uid] for pod in alive if pod.uid in requests), None)
    flavor = flavors.get((admission.queue or "", admission.flavor or "")) if admission is not None else None
    if admission is None or flavor is None or per_pod is None:
        return None
    units = per_pod.get(flavor.resource_name, 0)
    return Workload(
        uid=uid,
        namespace=alive[0].namespace,
        name=alive[0].job_name,
        queue=admission.queue,
        since=now,
        waits_since=now,
        request=Request(resource=flavor.resource_name, units=units, pods=(len(alive),), per_pod=tuple(sorted(per_pod.items()))),
        waits=False,
        allocation=Allocation(
            queue=admission.queue or "",
            flavor=flavor.name,
            pods=len(alive),
            units=units,
            since=parse_time(admission.admitted_at) or now,
            bound=_bound(alive),
            stopping=True,
        ),
    )


def sealed_admission(workers: Iterable[PodView], uid: str, settings: Settings, *, leaving: bool = False) -> AdmissionStatus | None:
    """What a gang was admitted to, from the pods that still run: only what bears the operator's seal for this job is believed."""
    for pod in workers:
        alive = not pod.ended and (leaving or not pod.deleting)
        if alive and is_sealed(settings.seal_key, uid, pod.admission, pod.seal):
            with contextlib.suppress(ValueError):
                return AdmissionStatus.model_validate_json(pod.admission)
    return None


def leaving(workload: Workload, pods: Iterable[PodView]) -> Workload | None:
    """A job that is gone, as it was last seen, with what the pods that it has left still hold; None when the last of them has ended."""
    alive = [p for p in pods if not p.ended]
    if workload.allocation is None or not alive:
        return None
    held = dataclasses.replace(workload.allocation, pods=len(alive), bound=_bound(alive), stopping=True)
    return dataclasses.replace(workload, allocation=held, waits=False)


def _bound(pods: Iterable[PodView]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(pod.node for pod in pods if pod.node).items()))


def _allocation(
    admission: Object, pods: int, request: Request, alive: list[PodView], raw: Object, now: datetime, *, stopping: bool
) -> Allocation:
    status = as_object(raw.get("status"))
    since = parse_time(admission.get("admittedAt")) or now
    saved = parse_time(as_object(status.get("checkpoint")).get("savedAt"))
    running = parse_time(as_object(status.get("gang")).get("runningSince"))
    domain = as_object(admission.get("topology"))
    return Allocation(
        queue=admission.get("queue") or "",
        flavor=admission.get("flavor") or "",
        pods=pods,
        units=request.units,
        since=since,
        saved_at=max((at for at in (saved, running) if at is not None), default=None),
        bound=_bound(alive),
        topology=(domain["key"], domain["value"]) if domain.get("key") and domain.get("value") else None,
        stopping=stopping,
    )

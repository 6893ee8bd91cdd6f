"""PURE: raw API objects -> what the queue sees of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any

from finetune_api import names
from finetune_api.queue import ANNOTATION_QUEUE, FineTuneQueueSpec, FineTuneQueueStatus
from finetune_api.scalars import quantity
from finetune_api.spec import FineTuneJobSpec

from ..reconcile.model import PodView, parse_time
from ..settings import Settings
from .model import Ask, Held, Namespace, Node, Queue, Taint, Workload

Object = dict[str, Any]
_EPOCH = datetime.fromtimestamp(0, UTC)


def amount(resource: str, text: Any) -> int:
    """A quantity as a whole number: thousandths of CPUs, bytes, units. What cannot be read is nothing."""
    try:
        value = quantity(str(text))
    except ValueError:
        return 0
    return int((value * 1000 if resource == "cpu" else value).to_integral_value(ROUND_CEILING))


def requests(pod_spec: Object) -> dict[str, int]:
    """What the scheduler counts for a pod: the sum of its containers or the largest init container, and the overhead (KEP-688)."""

    def of(container: Object) -> dict[str, int]:
        resources = container.get("resources") or {}
        asked = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
        return {name: amount(name, value) for name, value in asked.items()}

    total: Counter[str] = Counter()
    for container in pod_spec.get("containers") or ():
        total.update(of(container))
    for container in pod_spec.get("initContainers") or ():
        for name, value in of(container).items():
            total[name] = total[name] + value if container.get("restartPolicy") == "Always" else max(total[name], value)
    for name, value in (pod_spec.get("overhead") or {}).items():
        total[name] += amount(name, value)
    return dict(total)


def node(raw: Object, used: Mapping[str, int]) -> Node:
    """A node with what pods hold of it."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or ())
    return Node(
        name=raw["metadata"]["name"],
        labels=raw["metadata"].get("labels") or {},
        taints=tuple(
            Taint(key=t.get("key", ""), value=t.get("value", ""), effect=t["effect"])
            for t in spec.get("taints") or ()
            if t.get("effect") in ("NoSchedule", "NoExecute")
        ),
        allocatable={name: amount(name, value) for name, value in (status.get("allocatable") or {}).items()},
        used=used,
        usable=ready and not spec.get("unschedulable"),
    )


def queue(raw: Object) -> Queue | None:
    """A FineTuneQueue, or None when its spec cannot be read."""
    try:
        spec = FineTuneQueueSpec.model_validate(raw.get("spec"), extra="ignore")
    except ValueError:
        return None
    try:
        status = FineTuneQueueStatus.model_validate(raw.get("status") or {}, extra="ignore")
    except ValueError:
        status = FineTuneQueueStatus()
    return Queue(name=raw["metadata"]["name"], spec=spec, history=status.history)


def namespace(raw: Object) -> Namespace:
    """Labels and default queue of a namespace."""
    meta = raw["metadata"]
    return Namespace(labels=meta.get("labels") or {}, queue=(meta.get("annotations") or {}).get(ANNOTATION_QUEUE))


def ask_of(spec: FineTuneJobSpec) -> Ask:
    """What a job's gang needs."""
    distribution, resources = spec.distribution, spec.resources
    gpus = distribution.gpus_per_node
    per_pod: dict[str, int] = {}
    for name in ("cpu", "memory"):
        wanted = getattr(resources.requests, name) or getattr(resources.limits, name)
        if wanted is not None:
            per_pod[name] = amount(name, wanted)
    if gpus:
        per_pod[resources.gpu_resource_name] = gpus
    fewest = distribution.min_nodes or distribution.nodes
    batch = spec.tuning.hyperparameters.global_batch_size
    sizes = [n for n in range(distribution.nodes, fewest - 1, -1) if batch % (n * max(1, gpus)) == 0]
    return Ask(
        resource=resources.gpu_resource_name if gpus else "cpu",
        units=gpus or int((Decimal(per_pod.get("cpu", 0)) / 1000).to_integral_value(ROUND_CEILING)),
        pods=tuple(sizes) or (distribution.nodes,),
        per_pod=tuple(sorted(per_pod.items())),
        selector=tuple(sorted(spec.scheduling.node_selector.items())),
        tolerations=tuple((t.key, t.operator, t.value, t.effect) for t in spec.scheduling.tolerations),
        topology_key=spec.scheduling.topology_key or "",
    )


def _evaluation_ask(ask: Ask, settings: Settings) -> Ask:
    per_pod = {ask.resource: 1, "cpu": amount("cpu", settings.stage_cpu), "memory": amount("memory", settings.stage_memory)}
    return Ask(
        resource=ask.resource,
        units=1,
        pods=(1,),
        per_pod=tuple(sorted(per_pod.items())),
        selector=ask.selector,
        tolerations=ask.tolerations,
    )


def has_ended(raw: Object) -> bool:
    """Whether a job's end is on record."""
    return bool(_object(raw.get("status")).get("finishedAt"))


def is_still(raw: Object) -> bool:
    """Whether a job looks the same at any time: it is not held back until some time."""
    return not _object(raw.get("status")).get("retryAfter")


def workload(
    raw: Object,
    spec: FineTuneJobSpec,
    ask: Ask,
    pods: Iterable[PodView],
    priority: int,
    settings: Settings,
    now: datetime,
    *,
    ready: bool = False,
) -> Workload:
    """A job with what it holds. `pods`: its workers, and those of its evaluation. `ready`: its data is, not yet on record."""
    meta, status = raw["metadata"], _object(raw.get("status"))
    conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or () if isinstance(c, dict)}

    def is_true(type_: str) -> bool:
        return conditions.get(type_) == "True"

    finished, trained, admitted = is_true("Succeeded") or is_true("Failed"), is_true("Trained"), is_true("Admitted")
    suspended = spec.run_policy.suspend or is_true("Suspended")
    admission = _object(status.get("admission"))
    alive = [p for p in pods if p.phase not in ("Succeeded", "Failed")]
    gang = [p for p in alive if p.stage == "train"]
    evaluates = (
        trained and not finished and spec.evaluation is not None and not is_true("Evaluated") and spec.distribution.gpus_per_node > 0
    )
    keeps = admitted and not finished and not suspended
    held = None
    if keeps and evaluates and not gang:
        ask = _evaluation_ask(ask, settings)
        held = _held(admission, 1, ask, [p for p in alive if p.job_uid], raw, now, stopping=False)
    elif keeps and not trained:
        held = _held(admission, int(admission.get("nodes") or ask.pods[0]), ask, gang, raw, now, stopping=False)
    elif gang:
        held = _held(admission, len(gang), ask, gang, raw, now, stopping=True)
    retry_after = parse_time(status.get("retryAfter"))
    waiting = _object(status.get("queue"))
    created = parse_time(meta.get("creationTimestamp")) or _EPOCH
    return Workload(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        queue=spec.scheduling.queue,
        user=str(_object(meta.get("annotations")).get(names.ANNOTATION_CREATED_BY) or ""),
        priority=priority,
        since=created,
        waits_since=parse_time(waiting.get("since")) or now,
        ask=ask,
        waits=(ready or is_true("DataReady"))
        and not (trained or finished or suspended or admitted)
        and (retry_after is None or retry_after <= now),
        held=held,
    )


def _object(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def _held(admission: Object, pods: int, ask: Ask, alive: list[PodView], raw: Object, now: datetime, *, stopping: bool) -> Held:
    status = _object(raw.get("status"))
    since = parse_time(admission.get("admittedAt")) or now
    saved = parse_time(_object(status.get("checkpoint")).get("savedAt"))
    running = parse_time(_object(status.get("gang")).get("runningSince"))
    domain = _object(admission.get("topology"))
    bound: dict[str, int] = defaultdict(int)
    for pod in alive:
        if pod.node:
            bound[pod.node] += 1
    return Held(
        queue=admission.get("queue") or "",
        flavour=admission.get("flavour") or "",
        pods=pods,
        units=ask.units,
        since=since,
        saved_at=max((at for at in (saved, running) if at is not None), default=None),
        bound=tuple(sorted(bound.items())),
        topology=(domain["key"], domain["value"]) if domain.get("key") and domain.get("value") else None,
        stopping=stopping,
    )

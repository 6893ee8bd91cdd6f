"""Raw nodes, queues and namespaces -> the few fields that decisions need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import ROUND_CEILING
from typing import Any

from finetune_api.queue import ANNOTATION_QUEUE, FineTuneQueueSpec, FineTuneQueueStatus
from finetune_api.scalars import quantity

from .objects import Object
from .queueing import Namespace, Node, Queue, Taint


def amount(resource: str, text: Any) -> int:
    """A quantity as a whole number: thousandths of CPUs, bytes, units. What cannot be read is nothing."""
    try:
        value = quantity(str(text))
    except ValueError:
        return 0
    return int((value * 1000 if resource == "cpu" else value).to_integral_value(ROUND_CEILING))


def pod_requests(pod_spec: Object) -> dict[str, int]:
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


def node_of(raw: Object, used: Mapping[str, int]) -> Node:
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


def queue_of(raw: Object) -> Queue | None:
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


def namespace_of(raw: Object) -> Namespace:
    """Labels and default queue of a namespace."""
    meta = raw["metadata"]
    return Namespace(labels=meta.get("labels") or {}, queue=(meta.get("annotations") or {}).get(ANNOTATION_QUEUE))

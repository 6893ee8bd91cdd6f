"""Raw nodes, queues and namespaces -> the few fields that decisions need. Knows nothing of jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import ROUND_CEILING
from typing import Any

from finetune_api.base import SHOWN, shortened
from finetune_api.queue import ANNOTATION_QUEUE, FineTuneQueueSpec, FineTuneQueueStatus, Flavor
from finetune_api.scalars import quantity
from finetune_api.validation import InvalidDocument, parse_queue

from .objects import Object
from .queueing import Namespace, Node, Queue, Taint

MORE_THAN_ANY = 2**63 - 1
"""What a pod counts for whose request cannot be read: nobody knows what it holds, so it holds all that its node has of it."""
NOT_READY = "not ready"
_MESSAGE = 1000
"""Characters of what is wrong with a queue."""


def amount(resource: str, text: Any) -> int:
    """A quantity as a whole number: thousandths of CPUs, bytes, units; rounded up. Raises ValueError when it cannot be read or is negative."""
    value = quantity(str(text))
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    return int((value * 1000 if resource == "cpu" else value).to_integral_value(ROUND_CEILING))


def pod_requests(pod_spec: Object) -> dict[str, int]:
    """What the scheduler counts for a pod: the sum of its containers or the largest init container, and the overhead (KEP-688)."""

    def of(wanted: Mapping[str, Any]) -> dict[str, int]:
        found = {}
        for name, value in wanted.items():
            try:
                found[name] = amount(name, value)
            except ValueError:
                found[name] = MORE_THAN_ANY
        return found

    def requests(container: Object) -> dict[str, int]:
        resources = container.get("resources") or {}
        return of({**(resources.get("limits") or {}), **(resources.get("requests") or {})})

    total: Counter[str] = Counter()
    for container in pod_spec.get("containers") or ():
        total.update(requests(container))
    for container in pod_spec.get("initContainers") or ():
        for name, value in requests(container).items():
            total[name] = total[name] + value if container.get("restartPolicy") == "Always" else max(total[name], value)
    total.update(of(pod_spec.get("overhead") or {}))
    return dict(total)


def is_ready(raw: Object) -> bool:
    """Whether a node's kubelet answers."""
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in (raw.get("status") or {}).get("conditions") or ())


def node_of(raw: Object) -> Node:
    """A node, of which nothing is held. Of what cannot be read it has nothing."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    allocatable, unreadable = {}, {}
    for name, value in (status.get("allocatable") or {}).items():
        try:
            allocatable[name] = amount(name, value)
        except ValueError:
            unreadable[name] = shortened(str(value), SHOWN)
    return Node(
        name=raw["metadata"]["name"],
        labels=raw["metadata"].get("labels") or {},
        taints=tuple(
            Taint(key=t.get("key", ""), value=t.get("value", ""), effect=t["effect"])
            for t in spec.get("taints") or ()
            if t.get("effect") in ("NoSchedule", "NoExecute")
        ),
        allocatable=allocatable,
        unreadable=unreadable,
        away=NOT_READY if not is_ready(raw) else "cordoned" if spec.get("unschedulable") else "",
    )


def queue_of(raw: Object) -> Queue:
    """A FineTuneQueue. One whose spec cannot be read keeps its place, and says so, until it can be."""
    try:
        status = FineTuneQueueStatus.model_validate(raw.get("status") or {}, extra="ignore")
    except ValueError:
        status = FineTuneQueueStatus()
    name = raw["metadata"]["name"]
    try:
        return Queue(name=name, spec=parse_queue(raw, strict=False), history=status.history)
    except InvalidDocument as failure:
        return Queue(
            name=name, spec=_stand_in(raw.get("spec"), status), history=status.history, unreadable=shortened(str(failure), _MESSAGE)
        )


def _stand_in(spec: Any, status: FineTuneQueueStatus) -> FineTuneQueueSpec:
    """For a spec that cannot be read: it lends nothing, and of what its jobs hold, all beyond the quota last put on record is borrowed."""
    raw = spec if isinstance(spec, dict) else {}
    listed = raw.get("flavors")
    written = listed if isinstance(listed, list) else []
    quotas = {flavor["name"]: 0 for flavor in written if isinstance(flavor, dict) and isinstance(flavor.get("name"), str)}
    quotas.update((flavor.name, flavor.nominal) for flavor in status.flavors)
    flavors = [Flavor.model_construct(name=name, nominal_quota=quota, lending_limit=0) for name, quota in quotas.items()]
    cohort = raw.get("cohort")
    return FineTuneQueueSpec.model_construct(flavors=flavors, cohort=cohort if isinstance(cohort, str) else None)


def namespace_of(raw: Object) -> Namespace:
    """Labels and default queue of a namespace."""
    meta = raw["metadata"]
    return Namespace(labels=meta.get("labels") or {}, queue=(meta.get("annotations") or {}).get(ANNOTATION_QUEUE))

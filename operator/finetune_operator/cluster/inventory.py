"""The watches that keep the inventory up: which kinds, and which of their fields. Knows nothing of what is decided by them.

kopf has one selector for each resource, and keeps whole objects while it handles them: nodes and the pods of others would
cost two hundred megabytes. Here everything but the fields below is skipped while it is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import msgspec

from finetune_api.queue import QUEUE_KIND

from ..cache.inventory import Inventory, read_namespace, read_node, read_pod, read_priority
from ..model.objects import Object
from ..settings import Settings
from .reflector import Reflector
from .resources import plural_of
from .transport import Cluster

T = TypeVar("T")
_HOLDS = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"
"""Pods that hold something of a node: one that ends leaves as if it were deleted"""
Quantities = dict[str, str | int | float] | None


class _Named(TypedDict, total=False):
    name: str


class _Labelled(_Named, total=False):
    labels: dict[str, str] | None


class _Annotated(_Labelled, total=False):
    annotations: dict[str, str] | None


class _Taint(TypedDict, total=False):
    key: str
    value: str
    effect: str


class _NodeSpec(TypedDict, total=False):
    taints: list[_Taint] | None
    unschedulable: bool | None


class _Condition(TypedDict, total=False):
    type: str
    status: str


class _NodeStatus(TypedDict, total=False):
    allocatable: Quantities
    conditions: list[_Condition] | None


class _Node(TypedDict, total=False):
    metadata: _Labelled
    spec: _NodeSpec
    status: _NodeStatus


class _Resources(TypedDict, total=False):
    requests: Quantities
    limits: Quantities


class _Container(TypedDict, total=False):
    resources: _Resources
    restartPolicy: str | None


class _PodSpec(TypedDict, total=False):
    nodeName: str
    containers: list[_Container] | None
    initContainers: list[_Container] | None
    overhead: Quantities
    resources: _Resources | None


class _PodMetadata(TypedDict, total=False):
    uid: str


class _Pod(TypedDict, total=False):
    metadata: _PodMetadata
    spec: _PodSpec


class _Namespace(TypedDict, total=False):
    metadata: _Annotated


class _PriorityClass(TypedDict, total=False):
    metadata: _Named
    value: int
    globalDefault: bool


def reader(fields: type[Any], read: Callable[[Object], T]) -> Callable[[bytes], T]:
    """An object's JSON to what is kept of it, by way of those of its fields alone. Raises ValueError, KeyError, TypeError."""
    decode = msgspec.json.Decoder(fields).decode
    return lambda raw: read(decode(raw))


def _as_it_is(raw: Object) -> Object:
    if not (isinstance(meta := raw.get("metadata"), dict) and isinstance(meta.get("name"), str)):
        raise ValueError("it has no name")
    return raw


NODE, POD = reader(_Node, read_node), reader(_Pod, read_pod)
NAMESPACE, PRIORITY = reader(_Namespace, read_namespace), reader(_PriorityClass, read_priority)
QUEUE = reader(dict[str, Any], _as_it_is)  # its status is written back


class InventoryWatch:
    """Keeps an inventory up: by watches while it runs; else as of the last `look`."""

    def __init__(self, cluster: Cluster, settings: Settings, changed: Callable[[], None] = lambda: None) -> None:
        """`changed`: something is different on which decisions depend."""
        self.inventory, self._runs = Inventory(changed), False
        known, self.reflectors = self.inventory, list[Reflector[Any]]()
        if settings.queueing_backend == "none":
            known.nodes.refuse(0, "queueing.backend is none")
            return
        self.reflectors = [
            Reflector(cluster, QUEUE_KIND, QUEUE, known.queues),
            Reflector(cluster, "Node", NODE, known.nodes),
            Reflector(cluster, "Namespace", NAMESPACE, known.namespaces),
            Reflector(cluster, "PriorityClass", PRIORITY, known.priorities),
        ]
        # of the namespaces that are served: what others hold is not seen, and the cluster's scheduler has the last word
        for namespace in settings.watch_namespaces or ("",):
            pods = Reflector(cluster, "Pod", POD, known.pods(namespace), namespace=namespace, field_selector=_HOLDS)
            self.reflectors.append(pods)

    @property
    def forbidden(self) -> tuple[str, ...]:
        """What of all this the operator may not list. Namespaces matter to queues alone."""
        kinds = [r.kind for r in self.reflectors if r.state == "not allowed" and (r.kind != "Namespace" or self.inventory.queues.items)]
        return tuple(plural_of(kind) for kind in dict.fromkeys(kinds))

    @property
    def states(self) -> dict[str, tuple[str, str]]:
        """By kind: where its watch stands (synced, not allowed, not served, ...), and what the server says of it."""
        return {reflector.kind: (reflector.state, reflector.why) for reflector in self.reflectors}

    @property
    def silent_seconds(self) -> float:
        """For how long nothing was heard of the kind that was heard of last of all."""
        return max((reflector.silent_seconds for reflector in self.reflectors), default=0.0)

    async def run(self) -> None:
        """Watch until cancelled."""
        self._runs = True
        try:
            async with asyncio.TaskGroup() as group:
                for reflector in self.reflectors:
                    group.create_task(reflector.run(), name=f"reflector-{reflector.kind}")
        finally:
            self._runs = False

    async def look(self) -> Inventory:
        """What is there: known since all was listed once, or, where nobody watches, listed now. Raises APIError."""
        for reflector in self.reflectors:
            if self._runs:
                await reflector.synced.wait()
            else:
                await reflector.list()
        return self.inventory

"""What the scheduler has to know of the cluster besides the jobs, and the LISTs that tell it."""

from __future__ import annotations

import dataclasses
import time

from .cluster.client import APIError, Cluster, Object
from .cluster.store import Store
from .queueing import view
from .queueing.model import Queue
from .settings import Settings


@dataclasses.dataclass
class World:
    """What is not the operator's own: as of the last LIST."""

    queues: dict[str, Object] = dataclasses.field(default_factory=dict)
    parsed: dict[str, Queue] = dataclasses.field(default_factory=dict)
    """Those of the queues that can be read"""
    nodes: list[Object] | None = None
    pods: list[tuple[str, str, dict[str, int]]] = dataclasses.field(default_factory=list)
    """(UID, node, requests) of every pod that holds something of a node, but for the jobs' workers: those are known as they are."""
    namespaces: dict[str, Object] = dataclasses.field(default_factory=dict)
    priorities: dict[str, int] = dataclasses.field(default_factory=dict)
    default_priority: int = 0
    at: float = float("-inf")
    took: float = 0.0


async def look_around(cluster: Cluster, store: Store, settings: Settings) -> World:
    """LIST queues, nodes, namespaces, priorities, and the pods of others. Raises APIError when the server does not answer."""
    began = time.monotonic()
    queues = await _list(cluster, "FineTuneQueue")
    # one that serves some namespaces does not see what others hold: quota alone decides then
    nodes = await _list(cluster, "Node") if not settings.watch_namespaces else None
    found = World(
        queues={raw["metadata"]["name"]: raw for raw in queues or ()},
        parsed={queue.name: queue for raw in queues or () if (queue := view.queue(raw)) is not None},
        nodes=nodes,
        namespaces={raw["metadata"]["name"]: raw for raw in (await _list(cluster, "Namespace") if queues else None) or ()},
    )
    for raw in await _list(cluster, "PriorityClass") or ():
        found.priorities[raw["metadata"]["name"]] = int(raw.get("value", 0))
        if raw.get("globalDefault"):
            found.default_priority = int(raw.get("value", 0))
    if nodes:
        found.pods = await _pods(cluster, store)
    found.at, found.took = time.monotonic(), time.monotonic() - began
    return found


async def _list(cluster: Cluster, kind: str) -> list[Object] | None:
    """All objects of a kind; None where the operator may not look, or the kind is not served."""
    try:
        return [raw async for raw in cluster.list(kind)]
    except APIError as failure:
        if failure.status not in (403, 404):
            raise
        return None


async def _pods(cluster: Cluster, store: Store) -> list[tuple[str, str, dict[str, int]]]:
    found = []
    async for raw in cluster.list("Pod"):
        node = (raw.get("spec") or {}).get("nodeName")
        if store.is_worker(raw["metadata"]["uid"]):
            continue
        if node and (raw.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
            found.append((raw["metadata"]["uid"], node, view.requests(raw["spec"])))
    return found

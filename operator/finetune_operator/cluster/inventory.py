"""The LISTs that tell what is in the cluster besides the jobs."""

from __future__ import annotations

import time

from ..cache.inventory import Inventory
from ..cache.store import Store
from ..model.nodes import pod_requests, queue_of
from ..model.objects import Object
from ..settings import Settings
from .transport import APIError, Cluster


async def look_around(cluster: Cluster, store: Store, settings: Settings) -> Inventory:
    """LIST queues, nodes, namespaces, priorities, and the pods of others. Raises APIError when the server does not answer."""
    began = time.monotonic()
    queues = await _list(cluster, "FineTuneQueue")
    # one that serves some namespaces does not see what others hold: quota alone decides then
    nodes = await _list(cluster, "Node") if not settings.watch_namespaces else None
    found = Inventory(
        queues={raw["metadata"]["name"]: raw for raw in queues or ()},
        parsed={raw["metadata"]["name"]: queue_of(raw) for raw in queues or ()},
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
            found.append((raw["metadata"]["uid"], node, pod_requests(raw["spec"])))
    return found

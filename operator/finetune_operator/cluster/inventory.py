"""The LISTs that tell what is in the cluster besides the jobs."""

from __future__ import annotations

import time

from ..cache.inventory import Inventory
from ..cache.store import Store
from ..model.nodes import pod_requests, queue_of
from ..model.objects import Object
from ..settings import Settings
from .resources import plural_of
from .transport import APIError, Cluster


async def look_around(cluster: Cluster, store: Store, settings: Settings) -> Inventory:
    """LIST queues, nodes, namespaces, priorities, and the pods of others. Raises APIError when the server does not answer."""
    began = time.monotonic()
    if settings.queueing_backend == "none":
        return Inventory(at=began)
    forbidden: list[str] = []
    queues = await _list(cluster, "FineTuneQueue", forbidden)
    nodes = await _list(cluster, "Node", forbidden)
    found = Inventory(
        queues={raw["metadata"]["name"]: raw for raw in queues or ()},
        parsed={raw["metadata"]["name"]: queue_of(raw) for raw in queues or ()},
        nodes=nodes,
        namespaces={raw["metadata"]["name"]: raw for raw in (await _list(cluster, "Namespace", forbidden) if queues else None) or ()},
    )
    for raw in await _list(cluster, "PriorityClass", forbidden) or ():
        found.priorities[raw["metadata"]["name"]] = int(raw.get("value", 0))
        if raw.get("globalDefault"):
            found.default_priority = int(raw.get("value", 0))
    if nodes:
        found.pods = await _pods(cluster, store, settings.watch_namespaces or ("",))
    found.forbidden = tuple(forbidden)
    found.at, found.took = time.monotonic(), time.monotonic() - began
    return found


async def _list(cluster: Cluster, kind: str, forbidden: list[str]) -> list[Object] | None:
    """All objects of a kind; None where the operator may not look, which is noted, or the kind is not served."""
    try:
        return [raw async for raw in cluster.list(kind)]
    except APIError as failure:
        if failure.status not in (403, 404):
            raise
        if failure.status == 403:
            forbidden.append(plural_of(kind))
        return None


async def _pods(cluster: Cluster, store: Store, spaces: tuple[str, ...]) -> list[tuple[str, str, dict[str, int]]]:
    """Of the namespaces that are served: what others hold is not seen, and the cluster's scheduler has the last word."""
    found = []
    for namespace in spaces:
        async for raw in cluster.list("Pod", namespace):
            node = (raw.get("spec") or {}).get("nodeName")
            if store.is_worker(raw["metadata"]["uid"]):
                continue
            if node and (raw.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
                found.append((raw["metadata"]["uid"], node, pod_requests(raw["spec"])))
    return found

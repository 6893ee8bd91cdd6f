"""The operator is uninstalled: it is stopped, and nothing of ours keeps an object from being deleted any more.

Nothing else of this operator has a finalizer than endpoints, and only the operator that acts puts it there: who has its Lease is alone.
Knows nothing of what endpoints serve.
"""

from __future__ import annotations

import asyncio
import logging

from finetune_api import names
from finetune_api.endpoint import ENDPOINT_KIND

from ..cluster.errors import APIError
from ..cluster.lease import Lease
from ..cluster.transport import Cluster
from ..model.objects import Object
from ..settings import Settings

log = logging.getLogger("finetune.leaving")
_AGAIN_SECONDS = 1.0


async def leave(cluster: Cluster, settings: Settings, lease: Lease | None) -> int:
    """Stop the operator's Deployment, wait until nobody acts, and take the finalizer off all endpoints; how many had it. Raises APIError."""
    if lease is not None:
        try:
            await cluster.patch("Deployment", settings.namespace, settings.service_name, {"spec": {"replicas": 0}})
        except APIError as failure:
            if not failure.not_found:
                raise
        await lease.acquire()
    freed = 0
    for namespace in settings.watch_namespaces or ("",):
        try:
            async for raw in cluster.list(ENDPOINT_KIND, namespace):
                freed += await _free(cluster, raw)
        except APIError as failure:
            if not failure.not_found:  # its definition is gone already
                raise
    log.info("%d endpoints are let go of", freed)
    return freed


async def _free(cluster: Cluster, raw: Object) -> bool:
    """Whether it had our finalizer. Others may write it at the same time."""
    meta = raw["metadata"]
    while True:
        finalizers = list(meta.get("finalizers") or ())
        if names.FINALIZER not in finalizers:
            return False
        finalizers.remove(names.FINALIZER)
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": meta.get("resourceVersion")}}
        try:
            await cluster.patch(ENDPOINT_KIND, meta["namespace"], meta["name"], body)
        except APIError as failure:
            if failure.not_found:
                return False
            if not failure.conflict:
                raise
            await asyncio.sleep(_AGAIN_SECONDS)
            meta = (await cluster.get(ENDPOINT_KIND, meta["namespace"], meta["name"]))["metadata"]
        else:
            return True

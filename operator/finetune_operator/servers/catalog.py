"""Where the catalog pods of a FineTunedModel tell what is at its storage: pods of a Job that belongs to the very object.

A report carries a projected service-account token whose audience names the object (tokens.py); the UID of the pod that holds it leads
to its Job, and so to the object. Knows nothing of what becomes of a report.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web
from pydantic import ValidationError

from finetune_api.contract import CATALOG_BODY_LIMIT, CatalogReport, catalog_audience, catalog_path
from finetune_api.tuned_model import MODEL_KIND

from .. import metrics
from ..cache.catalog import CatalogBoard, Reported
from ..cache.store import Store
from ..cluster.transport import Cluster
from ..model.objects import Key
from .reports import taking
from .tokens import Tokens

log = logging.getLogger("finetune.catalog")
PATH = catalog_path("{namespace}", "{name}")
_AT_ONCE = 2
"""Reports that are read at the same time: each may have megabytes."""


class CatalogServer:
    """Checks reports and puts them on the board."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        board: CatalogBoard,
        wake: Callable[[Key, str], None],
        acting: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store, self._board, self._wake, self._acting = store, board, wake, acting
        self._tokens, self._reads = Tokens(cluster), asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[web.RouteDef]:
        """What the HTTPS server takes."""
        return [web.post(PATH, taking(metrics.CATALOG_REPORTS, self._acting, self._report))]

    async def _report(self, request: web.Request) -> web.Response:
        key = namespace, name = request.match_info["namespace"], request.match_info["name"]
        pod_uid = await self._tokens.pod_of(request, catalog_audience(namespace, name), "FineTunedModel")
        pod, model = self._store.pod(pod_uid), self._store.models.get(key)
        job = self._store.child_job(pod.job_uid) if pod is not None else None
        if model is None or job is None or job.owner != model["metadata"]["uid"]:
            raise web.HTTPForbidden(text="the pod does not belong to this FineTunedModel")
        async with self._reads:
            body = await _body(request)
            try:
                report = await asyncio.to_thread(CatalogReport.model_validate_json, body)
            except ValidationError:
                raise web.HTTPBadRequest(text="not a catalog's report") from None
        self._board.put(model["metadata"]["uid"], Reported(report, job.name))
        log.info("%s/%s: %d records, by Job %s", namespace, name, len(report.records), job.name)
        self._wake(key, MODEL_KIND)
        return web.Response(status=204)


async def _body(request: web.Request) -> bytes:
    """The body, within its limit, which is another one than that of the application's small reports."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > CATALOG_BODY_LIMIT:
            raise web.HTTPRequestEntityTooLarge(CATALOG_BODY_LIMIT, len(body))
    return bytes(body)

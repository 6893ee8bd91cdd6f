"""HTTPS endpoint for progress reports: rank 0 of the current attempt of the very job that its token is bound to.

A report carries a projected service-account token whose audience names the job (tokens.py); the UID of the pod that holds it leads
to its owner and so to the job.
Knows nothing of what becomes of a report.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from aiohttp import web
from pydantic import ValidationError

from finetune_api.contract import PROGRESS_BODY_LIMIT, ProgressReport, progress_audience

from .. import metrics
from ..cache.progress import ProgressBoard
from ..cache.store import Store
from ..cluster.transport import Cluster
from ..model.objects import Key
from .reports import taking
from .tokens import CACHE_SIZE, Tokens

log = logging.getLogger("finetune.progress")
PATH = "/v1/namespaces/{namespace}/finetunejobs/{name}/progress"
_LEAST_INTERVAL = 0.2


class ProgressServer:
    """Checks reports and puts them on the board."""

    def __init__(
        self, cluster: Cluster, store: Store, board: ProgressBoard, wake: Callable[[Key], None], acting: Callable[[], bool] = lambda: True
    ) -> None:
        self._cluster, self._store, self._board, self._wake, self._acting = cluster, store, board, wake, acting
        self._tokens = Tokens(cluster)
        self._last: dict[str, float] = {}

    def application(self) -> web.Application:
        """The aiohttp application; bodies over the limit are refused before they are read."""
        app = web.Application(client_max_size=PROGRESS_BODY_LIMIT)
        app.router.add_post(PATH, taking(metrics.PROGRESS_REPORTS, self._acting, self._report))
        return app

    async def _report(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        pod_uid = await self._tokens.pod_of(request, progress_audience(namespace, name), "job")
        now = time.monotonic()
        if now - self._last.get(pod_uid, 0.0) < _LEAST_INTERVAL:
            raise web.HTTPTooManyRequests(text="too many reports", headers={"Retry-After": "1"})
        self._remember(pod_uid, now)
        if request.content_length is not None and request.content_length > PROGRESS_BODY_LIMIT:
            raise web.HTTPRequestEntityTooLarge(PROGRESS_BODY_LIMIT, request.content_length)
        try:
            report = ProgressReport.model_validate(json.loads(await request.read()))
        except (ValidationError, ValueError, RecursionError):
            raise web.HTTPBadRequest(text="not a progress report") from None

        pod = self._store.pod(pod_uid)
        job = self._store.job_of_uid(pod.owner) if pod is not None else None
        if pod is None or job is None or (job["metadata"]["namespace"], job["metadata"]["name"]) != (namespace, name):
            raise web.HTTPForbidden(text="the pod does not belong to this job")
        current = int((job.get("status") or {}).get("attempt", 0))
        if not pod.is_worker or pod.rank != 0 or pod.attempt != report.attempt or report.attempt < current:
            raise web.HTTPForbidden(text="only rank 0 of the current attempt reports progress")
        if self._board.put(job["metadata"]["uid"], report, self._cluster.now()):
            self._wake((namespace, name))
        return web.Response(status=204)

    def _remember(self, pod_uid: str, now: float) -> None:
        self._last[pod_uid] = now
        if len(self._last) > CACHE_SIZE:
            self._last = {uid: at for uid, at in self._last.items() if now - at < 60}

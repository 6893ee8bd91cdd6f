"""HTTPS endpoint for progress reports: rank 0 of the current attempt of the very job that its token is bound to.

A report carries a projected service-account token whose audience names the job. TokenReview tells which pod holds
it; the pod's UID leads to its owner and so to the job. Labels and names that a tenant can choose decide nothing.
Knows nothing of what becomes of a report.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import ValidationError

from finetune_api.contract import PROGRESS_BODY_LIMIT, ProgressReport, progress_audience

from .. import metrics
from ..cache.progress import ProgressBoard
from ..cache.store import Store
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.objects import Key

log = logging.getLogger("finetune.progress")
PATH = "/v1/namespaces/{namespace}/finetunejobs/{name}/progress"
_CACHE_SECONDS, _CACHE_SIZE = 120.0, 10_000
_LEAST_INTERVAL = 0.2
_REVIEWS_AT_ONCE = 8


@dataclass(frozen=True)
class _Review:
    pod_uid: str
    """Empty: the token was refused."""
    until: float


class ProgressServer:
    """Checks reports and puts them on the board."""

    def __init__(
        self, cluster: Cluster, store: Store, board: ProgressBoard, wake: Callable[[Key], None], acting: Callable[[], bool] = lambda: True
    ) -> None:
        self._cluster, self._store, self._board, self._wake, self._acting = cluster, store, board, wake, acting
        self._reviewed: dict[str, _Review] = {}
        self._last: dict[str, float] = {}
        self._reviews = asyncio.Semaphore(_REVIEWS_AT_ONCE)

    def application(self) -> web.Application:
        """The aiohttp application; bodies over the limit are refused before they are read."""
        app = web.Application(client_max_size=PROGRESS_BODY_LIMIT)
        app.router.add_post(PATH, self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.Response:
        try:
            response = await self._report(request)
        except web.HTTPException as refused:
            metrics.PROGRESS_REPORTS.labels(code=refused.status).inc()
            raise
        metrics.PROGRESS_REPORTS.labels(code=response.status).inc()
        return response

    async def _report(self, request: web.Request) -> web.Response:
        if not self._acting():  # the pod's next report may reach the one that acts
            raise web.HTTPServiceUnavailable(text="this operator stands by", headers={"Retry-After": "1"})
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > 8192:
            raise web.HTTPUnauthorized(text="a bearer token is required")
        pod_uid = await self._pod_of(token, progress_audience(namespace, name))
        if not pod_uid:
            raise web.HTTPUnauthorized(text="the token is not valid for this job")
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
        if len(self._last) > _CACHE_SIZE:
            self._last = {uid: at for uid, at in self._last.items() if now - at < 60}

    async def _pod_of(self, token: str, audience: str) -> str:
        """UID of the pod that the token is bound to, or empty when the API server refuses the token."""
        key = hashlib.sha256(f"{audience}\0{token}".encode()).hexdigest()
        now = time.monotonic()
        known = self._reviewed.get(key)
        if known is not None and known.until > now:
            return known.pod_uid
        async with self._reviews:
            try:
                status = await self._cluster.review_token(token, audience)
            except APIError as failure:
                raise web.HTTPServiceUnavailable(text="tokens cannot be checked now") from failure
        extra = (status.get("user") or {}).get("extra") or {}
        uids = extra.get("authentication.kubernetes.io/pod-uid") or []
        good = status.get("authenticated") is True and audience in (status.get("audiences") or ()) and len(uids) == 1
        if len(self._reviewed) >= _CACHE_SIZE:
            self._reviewed = {k: v for k, v in self._reviewed.items() if v.until > now}
            if len(self._reviewed) >= _CACHE_SIZE:
                self._reviewed.clear()
        self._reviewed[key] = _Review(str(uids[0]) if good else "", now + _CACHE_SECONDS)
        return str(uids[0]) if good else ""

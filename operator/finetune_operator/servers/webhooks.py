"""The HTTPS endpoints of the webhooks. Every replica answers, also one that stands by. Knows nothing of what is right (`review.py`)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from finetune_api import KIND
from finetune_api.queue import QUEUE_KIND

from .. import metrics
from ..cluster.errors import APIError
from ..cluster.transport import Cluster
from ..model.nodes import namespace_of, queue_of
from ..model.objects import Object
from ..model.queueing import may_use
from ..settings import Settings
from .review import Answer, Rights, mutate, parsed, validate

log = logging.getLogger("finetune.webhooks")
VALIDATE, MUTATE = "/admission/validate", "/admission/mutate"
BODY_LIMIT = 4 * 1024 * 1024
"""An object of etcd's size, old and new."""
BUDGET_SECONDS = 3.0
"""For all look-ups of a request together: the API server gives up after five (the chart's timeoutSeconds)."""


class AdmissionServer:
    """Looks up what a decision needs, and answers."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings

    def routes(self) -> list[web.RouteDef]:
        """For the application that has the certificate."""
        return [web.post(VALIDATE, self._validate), web.post(MUTATE, self._mutate)]

    async def _validate(self, request: web.Request) -> web.Response:
        review = await _read(request)
        answer = validate(review, await self._rights(review))
        return _write(review, answer, "validate")

    async def _mutate(self, request: web.Request) -> web.Response:
        review = await _read(request)
        return _write(review, mutate(review), "mutate")

    async def _rights(self, request: Mapping[str, Any]) -> Rights:
        namespace = str(request.get("namespace") or "")
        if (request.get("kind") or {}).get("kind") != KIND:
            return Rights()
        remote = self._settings.allows_remote_code(namespace)
        spec = parsed(request.get("object"))
        if spec is None or spec.scheduling.queue is None or not self._settings.counts_quota:
            return Rights(remote_code=remote)
        name = spec.scheduling.queue
        try:
            raw, found = await self._look_up((QUEUE_KIND, "", name), ("Namespace", "", namespace))
        except APIError as failure:
            log.info("queue %s is not looked at: %s", name, failure)
            if failure.not_found:  # it may come later; the scheduler looks again, and says so
                return Rights(remote_code=remote)
            return Rights(
                remote_code=remote, queue_unknown=f"whether namespace {namespace} may use queue {name} was not looked up: {failure}"
            )
        queue = queue_of(raw)
        if may_use(queue, namespace_of(found)):
            return Rights(remote_code=remote)
        return Rights(remote_code=remote, queue_refused=f"queue {queue.name} is not for namespace {namespace} (its namespaceSelector)")

    async def _look_up(self, *wanted: tuple[str, str, str]) -> list[Object]:
        """Objects by (kind, namespace, name), all at once and within the budget. Raises APIError, transient where time ran out."""
        tasks = [asyncio.ensure_future(self._cluster.get(*one)) for one in wanted]
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                return await asyncio.gather(*tasks)
        except TimeoutError:
            raise APIError(0, "Timeout", f"the API server did not answer within {BUDGET_SECONDS:.0f} s") from None
        finally:
            for task in tasks:  # what the answer does not wait for is not asked any longer
                task.cancel()


async def _read(request: web.Request) -> dict[str, Any]:
    if request.content_length is not None and request.content_length > BODY_LIMIT:
        raise web.HTTPRequestEntityTooLarge(max_size=BODY_LIMIT, actual_size=request.content_length)
    body = bytearray()
    async for chunk in request.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > BODY_LIMIT:
            raise web.HTTPRequestEntityTooLarge(max_size=BODY_LIMIT, actual_size=len(body))
    try:
        review = json.loads(bytes(body))["request"]
        if not isinstance(review, dict) or not isinstance(review["uid"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise web.HTTPBadRequest(text="expected an AdmissionReview of admission.k8s.io/v1") from None
    return review


def _write(review: Mapping[str, Any], answer: Answer, webhook: str) -> web.Response:
    metrics.ADMISSION_REVIEWS.labels(webhook=webhook, allowed=str(not answer.errors).lower()).inc()
    return web.json_response(answer.to_wire(str(review["uid"])))

"""The two servers: /v1 with the probes for users and the kubelet, and metrics with the canaries' counts for Prometheus and the operator."""

from __future__ import annotations

import calendar
import logging
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Protocol

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from finetune_api.serving import CANARY_PATH
from finetune_api.usage import USAGE_PATH

from . import metrics
from .access import Caller
from .bodies import Refusal
from .catalog import Catalog, Endpoint, asked, listed, near
from .choosing import Replicas
from .counting import CanaryBoard
from .proxy import FINE_TUNED, Proxy, Receive
from .relay import CutOff, Message, Send
from .usage import Reports

log = logging.getLogger("finetune.gateway")
_ENCODE = msgspec.json.Encoder().encode


def _probes(not_ready: Callable[[], str]) -> list[Route]:
    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        why = not_ready()
        return PlainTextResponse(why or "ok", status_code=503 if why else 200)

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


class Tuned(Protocol):
    """The fine-tuning API, where it is on."""

    def routes(self) -> list[Route]:
        """Its own."""

    def served(self, caller: Caller, endpoints: Iterable[Endpoint]) -> dict[str, tuple[int, str]]:
        """Names ft:... that a caller may use, with when they were made and whose they are."""


def users(proxy: Proxy, reports: Reports, not_ready: Callable[[], str], tuned: Tuned | None = None) -> Starlette:
    """What users reach. `not_ready`: why it is not; empty when it is."""

    async def models(request: Request) -> Response:
        caller = await proxy.caller(dict(request.scope))
        permitted = await proxy.permitted(caller)
        found = listed(permitted)
        wanted = request.path_params.get("model")
        fine_tuned = tuned.served(caller, permitted) if tuned is not None and (wanted is None or wanted.startswith(FINE_TUNED)) else {}
        if wanted is None:
            data = [_model(name, endpoint) for name, endpoint in found.items()]
            return _json({"object": "list", "data": [*data, *(_tuned(name, *about) for name, about in fine_tuned.items())]})
        if wanted in fine_tuned:
            return _json(_tuned(wanted, *fine_tuned[wanted]))
        plain = {f"{endpoint.namespace}/{name.rpartition('/')[2]}": endpoint for name, endpoint in found.items()} | found
        if asked(wanted) is None or wanted not in plain:
            hint = ", ".join(near(wanted, found))
            raise Refusal(
                404, f"model does not exist, or you may not use it; there are {hint or 'none'}", code="model_not_found", param="model"
            )
        return _json(_model(wanted, plain[wanted]))

    async def usage(request: Request) -> Response:
        found = await reports.usage(await proxy.caller(dict(request.scope)), request.query_params.multi_items())
        return Response(found.model_dump_json(by_alias=True, exclude_none=True), media_type="application/json")

    return Starlette(
        routes=[
            Route("/v1/chat/completions", proxy, methods=["POST"]),
            Route("/v1/completions", proxy, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", models, methods=["GET"]),
            Route(USAGE_PATH, usage, methods=["GET"]),
            *(tuned.routes() if tuned is not None else []),
            *_probes(not_ready),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _http, Exception: _mistake},
    )


def operators(catalog: Catalog, replicas: Replicas, board: CanaryBoard, not_ready: Callable[[], str]) -> Starlette:
    """What Prometheus and the operator reach, and the kubelet: users who take all connections do not end the pod."""

    async def scrape(_: Request) -> Response:
        metrics.PAUSED.set(replicas.paused)
        metrics.REPLICAS.clear()
        for endpoint in catalog.endpoints.values():
            metrics.REPLICAS.labels(*endpoint.key).set(len(endpoint.base))
        return Response(generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def canary(_: Request) -> Response:
        return _json([traffic.to_wire() for traffic in board.traffic(catalog.endpoints)])

    return Starlette(routes=[Route("/metrics", scrape), Route(CANARY_PATH, canary), *_probes(not_ready)])


class Edge:
    """Around an application: an answer that breaks off, or a mistake of ours, ends with its connection, and one line of log."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except CutOff as failure:
            log.info("an answer was cut off: %s", failure)


def _json(value: Any) -> Response:
    return Response(_ENCODE(value), media_type="application/json")


def _tuned(name: str, created: int, namespace: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": namespace}


def _model(name: str, endpoint: Endpoint) -> dict[str, Any]:
    try:
        created = calendar.timegm(datetime.fromisoformat(endpoint.created).utctimetuple())
    except ValueError:
        created = int(time.time())
    base = f"{endpoint.namespace}/{endpoint.name}"
    tuned = {} if name in (endpoint.name, base) and endpoint.name not in endpoint.models else {"parent": base}  # as vLLM calls a base
    return {"id": name, "object": "model", "created": created, "owned_by": endpoint.namespace, **tuned}


async def _refused(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    metrics.REFUSED.labels(code=refusal.code).inc()
    headers = {name.decode(): value.decode() for name, value in refusal.headers}
    return Response(refusal.body(), refusal.status, headers, media_type="application/json")


async def _mistake(request: Request, _: Exception) -> Response:
    return await _refused(request, Refusal(500, "the gateway made a mistake", code="internal_error", kind="server_error"))


async def _http(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    message = (
        f"there is /v1/chat/completions, /v1/completions, /v1/models and {USAGE_PATH}" if failure.status_code == 404 else failure.detail
    )
    return await _refused(request, Refusal(failure.status_code, message, code="not_found" if failure.status_code == 404 else "bad_request"))

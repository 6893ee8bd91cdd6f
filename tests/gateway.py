"""The gateway within a test: its real servers on loopback, before replicas that are real servers, too."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from finetune_api.api_keys import ApiKey, digest_of_key
from finetune_gateway.catalog import read_endpoint
from finetune_gateway.gateway import Gateway
from finetune_gateway.settings import Settings

KEY = "ftk_" + "k" * 43
Handler = Callable[[web.Request], Any]


async def until(what: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until it is true."""
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110  # of a server's, who sets no event
            await asyncio.sleep(0.005)


@dataclass
class Replica:
    """A server that answers as vLLM does, in tokens."""

    name: str = "replica"
    tokens: int = 3
    pause: float = 0.0
    usage: bool = True
    instead: Handler | None = None
    """Answers in its place."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    address: str = ""
    sent: bytes = b""
    """Of the last stream."""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.running += 1
        try:
            if self.instead is not None:
                found: web.StreamResponse = await self.instead(request)
                return found
            return await (self._stream(request, body) if body.get("stream") else self._whole(body))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _chunk(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        delta = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": [delta]}

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Secret": "of the replica"})
        await response.prepare(request)
        self.sent = b""
        for number in range(self.tokens):
            await self._write(response, self._chunk(body, f"{self.name}-{number} "))
            await asyncio.sleep(self.pause)
        if self.usage and (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
            await self._write(response, {**self._chunk(body, ""), "choices": [], "usage": usage})
        self.sent += b"data: [DONE]\n\n"
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _write(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        self.sent += data
        await response.write(data)

    async def _whole(self, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(self.pause)
        choice = {"index": 0, "message": {"role": "assistant", "content": self.name}, "finish_reason": "stop"}
        usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}} if self.usage else {}
        return web.json_response(
            {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], **usage, "more": None}
        )

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Replica]:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


def served(address: str, *names: str, state: str = "Verified", ready: bool = True) -> dict[str, Any]:
    """A pod of an endpoint's status."""
    models = [{"name": name, "state": state} for name in names]
    return {"name": f"pod-{address}", "address": address, "ready": ready, "models": models}


def endpoint(
    *pods: dict[str, Any],
    name: str = "chat",
    namespace: str = "team-a",
    model: str = "support-bot",
    version: int | None = 3,
    canary: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A FineTuneEndpoint with one tuned model."""
    found: dict[str, Any] = {"name": model, "version": version, **({"canary": canary} if canary else {})}
    meta = {"name": name, "namespace": namespace, "creationTimestamp": "2026-11-29T06:00:00Z"}
    return {"metadata": meta, "status": {"pods": list(pods), "models": [found] if model else []}}


class Reviews:
    """The API server's part, at the thin edge: by token who it is, and what each may use."""

    def __init__(self) -> None:
        self.users: dict[str, str] = {}
        self.rights: dict[str, set[tuple[str, str]]] = {}
        self.on_jobs: set[tuple[str, str, str]] = set()
        """User, verb and namespace."""
        self.tokens_asked = self.access_asked = 0

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        self.tokens_asked += 1
        if token not in self.users or audience:
            return {"authenticated": False}
        return {"authenticated": True, "audiences": ["https://kubernetes"], "user": {"username": self.users[token], "groups": ["g"]}}

    async def review_access(self, spec: dict[str, Any]) -> bool:
        self.access_asked += 1
        attributes = spec["resourceAttributes"]
        if attributes["resource"] == "finetunejobs":
            return (spec["user"], attributes["verb"], attributes["namespace"]) in self.on_jobs
        assert (attributes["group"], attributes["resource"], attributes["verb"]) == ("finetune.dev", "finetuneendpoints", "use")
        namespace, name = attributes.get("namespace", ""), attributes.get("name", "")
        return bool({(namespace, name), (namespace, ""), ("", "")} & self.rights.get(spec["user"], set()))


class Running:
    """A gateway that listens."""

    def __init__(self, settings: Settings, reviews: Reviews, kubernetes: Any = None) -> None:
        self.reviews = reviews
        self.why = ""
        self.parts = Gateway(settings, reviews, lambda: self.why, kubernetes)
        self.servers = self.parts.servers()
        self.url = self.metrics_url = ""

    def see(self, *endpoints: dict[str, Any]) -> None:
        self.parts.catalog.replace([read_endpoint(json.dumps(found).encode()) for found in endpoints])

    def key(self, key: str = KEY, identifier: str = "ci", **fields: Any) -> None:
        made = ApiKey(hash=digest_of_key(key), **{"namespace": "team-a", **fields})
        self.parts.keys.put({**self.parts.keys.known, made.hash: (identifier, made)})


@contextlib.asynccontextmanager
async def running(kubernetes: Any = None, **settings: Any) -> AsyncIterator[Running]:
    """A gateway with the key KEY for team-a."""
    usual = {"host": "127.0.0.1", "port": 0, "metrics_port": 0, "drain_seconds": 1.0}
    gateway = Running(Settings(**{**usual, **settings}), Reviews(), kubernetes)
    gateway.key()
    tasks = [asyncio.create_task(server.serve()) for server in gateway.servers]
    await until(lambda: all(server.started for server in gateway.servers))
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in gateway.servers]
    gateway.url, gateway.metrics_url = (f"http://127.0.0.1:{port}" for port in ports)
    try:
        yield gateway
    finally:
        for server in gateway.servers:
            server.should_exit = True
        await asyncio.gather(*tasks)
        await gateway.parts.close()

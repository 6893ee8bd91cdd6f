"""A request on its way: who asks, for what, and what answers. Keeps and logs no prompts."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from . import metrics
from .access import Access, Caller
from .bodies import Body, Refusal
from .catalog import Asked, Catalog, Endpoint, asked, listed, near
from .choosing import Target, choose
from .counting import Limits
from .ledger import Ledger
from .relay import Ask, Client, CutOff, Message, Relay, Send, labels
from .settings import Settings

Receive = Callable[[], Awaitable[Message]]
_SENT_ON = (b"x-request-id", b"traceparent")
"""Headers of a request that a replica gets. Nothing else: no token, no cookie, nothing about a connection."""
_PLAIN = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HUNG_UP = 499
FINE_TUNED = "ft:"
"""How OpenAI's names of fine-tuned models begin."""
Resolve = Callable[[str], Asked | None]


class _HungUp(Exception):
    """The client is gone."""


@dataclass(frozen=True)
class _Request:
    caller: Caller
    asked: Asked
    body: Body


class Proxy:
    """Answers /v1/chat/completions and /v1/completions. An ASGI application."""

    def __init__(
        self,
        catalog: Catalog,
        access: Access,
        limits: Limits,
        relay: Relay,
        ledger: Ledger | None,
        settings: Settings,
        resolve: Resolve = lambda model: None,
    ) -> None:
        """`ledger`: None where use is not kept. `resolve`: what a name ft:... is called at an endpoint."""
        self._resolve = resolve
        self._catalog, self._access, self._limits, self._relay, self._settings = catalog, access, limits, relay, settings
        self._ledger = ledger

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        arrived = time.perf_counter()
        metrics.RUNNING.inc()
        try:
            request = await self._read(scope, receive)
            target = await self._target(request)
            ask = Ask(
                path=scope["path"],
                body=request.body.named(target.upstream),
                headers=_sent_on(scope),
                arrived=arrived,
                key=request.caller.key,
                key_id=request.caller.key_id,
                user=request.caller.user,
            )
            self._count(ask, target, await self._answer(ask, target, receive, send))
        except Refusal as refusal:
            await refuse(send, refusal)
        except _HungUp:
            pass
        finally:
            metrics.RUNNING.dec()

    async def caller(self, scope: Message) -> Caller:
        """Who asks, within the limits of their key. Raises Refusal."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        caller = await self._access.caller(given[0] if len(given) == 1 else b"")
        if caller.key is not None:
            used_up = self._limits.admit(caller.key_id, caller.key.requests_per_minute, caller.key.tokens_per_minute)
            if used_up is not None:
                what, seconds = used_up
                message = f"the {what} per minute of this API key are used up"
                raise Refusal(429, message, code="rate_limit_exceeded", kind=what, retry_after=str(int(seconds) + 1))
        return caller

    async def permitted(self, caller: Caller) -> list[Endpoint]:
        """All endpoints that they may use. Raises Refusal."""
        return await self._access.permitted(caller, list(self._catalog.endpoints.values()))

    async def _read(self, scope: Message, receive: Receive) -> _Request:
        caller = await self.caller(scope)
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                raw = await self._body(scope, receive)
        except TimeoutError:
            message = f"the body did not come within {self._settings.body_seconds:g} s"
            raise Refusal(408, message, code="body_timeout", connection="close") from None
        body = Body(raw)
        wanted = asked(body.model)
        if body.model.startswith(FINE_TUNED):
            wanted = self._resolve(body.model) or Asked("", body.model, None)
        if wanted is None:
            message = "model is no name: write NAME, NAME@VERSION, or either with NAMESPACE/ before it"
            raise Refusal(400, message, code="invalid_model", param="model")
        return _Request(caller, wanted, body)

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        most = self._settings.body_bytes
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        parts, size = [], int(told) if told.isdigit() else 0
        if size <= most:
            size = 0
            while size <= most:
                message = await receive()
                if message["type"] != "http.request":
                    raise _HungUp
                parts.append(message["body"])
                size += len(message["body"])
                if not message.get("more_body") and size <= most:
                    return b"".join(parts)
        raise Refusal(413, f"the body has more than {most} bytes", code="body_too_large", connection="close")

    async def _target(self, request: _Request) -> Target:
        """Raises Refusal: nothing of that name (404), in several namespaces (400), or nothing of it answers now (503)."""
        wanted = request.asked
        may = await self._access.permitted(request.caller, self._catalog.candidates(wanted))
        if not may:
            found = near(str(wanted), listed(await self.permitted(request.caller)))
            hint = f"there are {', '.join(found)}" if found else "there is none that you may use"
            message = f"model {request.body.model} does not exist, or you may not use it; {hint}"
            raise Refusal(404, message, code="model_not_found", param="model")
        namespaces = sorted({endpoint.namespace for endpoint in may})
        if len(namespaces) > 1:
            names = ", ".join(f"{namespace}/{wanted}" for namespace in namespaces)
            message = f"model {wanted} is in several namespaces; write one of {names}"
            raise Refusal(400, message, code="ambiguous_model", param="model")
        target = choose(wanted, may, random.random)
        if target is None:
            message = f"no replica serves {wanted} verified now; kubectl describe finetuneendpoint -n {namespaces[0]} says why"
            raise Refusal(503, message, code="no_replica", kind="server_error", retry_after="5")
        return target

    async def _answer(self, ask: Ask, target: Target, receive: Receive, send: Send) -> int:
        """The status that the client got; what was asked of a replica ends with the client's connection. Raises Refusal."""
        task = asyncio.current_task()
        assert task is not None
        watch = asyncio.ensure_future(_hang_up(receive, task))
        try:
            return await self._relay.answer(ask, target, Client(send, watch))
        except asyncio.CancelledError:
            if not watch.done() or watch.cancelled():
                raise  # the gateway ends
            task.uncancel()
            return _HUNG_UP
        except Refusal as refusal:
            self._count(ask, target, refusal.status)
            raise
        except CutOff:
            if self._ledger is not None:
                self._ledger.request(target, ask.key_id, ask.user, error=False)  # the relay has told that it broke
            raise
        finally:
            watch.cancel()

    def _count(self, ask: Ask, target: Target, code: int) -> None:
        metrics.REQUESTS.labels(*labels(target), ask.key_id, str(code)).inc()
        if self._ledger is not None:
            self._ledger.request(target, ask.key_id, ask.user, error=code >= 400 and code != _HUNG_UP)


async def _hang_up(receive: Receive, task: asyncio.Task[None]) -> None:
    """Cancel the task when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _sent_on(scope: Message) -> dict[str, str]:
    found = {name.decode(): value.decode() for name, value in scope["headers"] if name in _SENT_ON and _PLAIN.fullmatch(value)}
    return {"content-type": "application/json", **found}


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer with OpenAI's error object."""
    metrics.REFUSED.labels(code=refusal.code).inc()
    body = refusal.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

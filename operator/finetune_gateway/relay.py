"""Asks replicas, one after the other until one begins to answer, and passes its bytes on as they come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from finetune_api.api_keys import ApiKey

from . import metrics
from .bodies import Refusal, broken_stream
from .choosing import Replicas, Target
from .counting import CanaryBoard, Limits, Meter
from .ledger import Ledger
from .settings import Settings

log = logging.getLogger("finetune.gateway")
Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
_SENT_BACK = ("Content-Type", "Content-Length", "Cache-Control", "X-Request-Id")
"""Headers of an answer that the client gets."""
_ANOTHER = frozenset({404, 502, 503})
"""Answers after which another replica is asked. 404: an engine that started anew has not loaded the model yet."""
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
_TICK_SECONDS = 0.5
"""A silence is measured as exactly as this."""
_IDLE_SECONDS = 15.0
"""Less than any replica keeps an idle connection: a request must not meet one that is being closed."""


def session(settings: Settings) -> aiohttp.ClientSession:
    """The connections to all replicas. Of what a replica sends nothing is kept or changed."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS, use_dns_cache=False),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        trust_env=False,
    )


@dataclass(frozen=True)
class Ask:
    """What is sent to a replica, and for whom."""

    path: str
    body: bytes
    headers: dict[str, str]
    arrived: float
    """By time.perf_counter()."""
    key: ApiKey | None
    key_id: str
    user: str
    """Of a Kubernetes token; empty with an API key."""


class Client:
    """The connection to whoever asked."""

    def __init__(self, send: Send, watch: asyncio.Future[None]) -> None:
        """`watch` waits for the client to hang up; from the last bytes on it is no news."""
        self._send, self._watch = send, watch
        self.started = self.waiting = False
        """Bytes have gone out; the client does not take them as fast as they come."""

    async def start(self, response: aiohttp.ClientResponse, target: Target) -> None:
        """Status and headers, as the replica sent them."""
        headers = [(b"x-finetune-model", f"{target.endpoint[0]}/{target.upstream}".encode())]
        found = response.headers
        headers += [(name.lower().encode(), found[name].encode("latin-1", "replace")) for name in _SENT_BACK if name in found]
        self.started = True
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def pass_on(self, chunk: bytes) -> None:
        """Bytes of the answer."""
        self.waiting = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self.waiting = False

    async def end(self, last: bytes = b"") -> None:
        """The answer is whole."""
        self._watch.cancel()
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


class _Stale(Exception):
    """The only replica closed an idle connection, it seems, as it was taken: it is asked once more."""


class Relay:
    """Sends requests to replicas."""

    def __init__(
        self,
        replicas: Replicas,
        limits: Limits,
        board: CanaryBoard,
        ledger: Ledger | None,
        settings: Settings,
        connections: aiohttp.ClientSession,
    ) -> None:
        """`ledger`: None where use is not kept."""
        self._ledger = ledger
        self._replicas, self._limits, self._board, self._settings, self._session = replicas, limits, board, settings, connections

    async def answer(self, ask: Ask, target: Target, client: Client) -> int:
        """The status that the client got. Raises Refusal where nothing has gone there: 503, 504."""
        latest = asyncio.get_running_loop().time() + self._settings.total_seconds
        tried: list[str] = []
        excused = False
        while len(tried) < self._settings.tries and (address := self._replicas.pick(target.replicas, tried)) is not None:
            try:
                status = await self._one(ask, target, client, address, latest)
            except _Stale:
                if not excused:
                    excused = True
                    continue
                status = None
            if status is not None:
                return status
            tried.append(address)
        message = f"{len(tried)} of {len(target.replicas)} replicas were asked, and none answered"
        raise Refusal(503, message, code="no_replica", kind="server_error", retry_after="2")

    async def _one(self, ask: Ask, target: Target, client: Client, address: str, latest: float) -> int | None:
        """The status that the client got; None where another replica is to be asked. Raises Refusal (504), _Stale."""
        loop, settings, begun = asyncio.get_running_loop(), self._settings, time.perf_counter()
        response: aiohttp.ClientResponse | None = None
        failed: bool | None = None
        waits = contextlib.ExitStack()
        waits.enter_context(metrics.WAITING.labels(*target.endpoint).track_inprogress())
        try:
            async with asyncio.timeout_at(min(latest, loop.time() + settings.first_byte_seconds)) as clock:
                url = URL(f"http://{address}{ask.path}", encoded=True)
                response = await self._session.post(url, data=ask.body, headers=ask.headers, allow_redirects=False)
                if response.status in _ANOTHER:
                    failed = True
                    self._failed(target, str(response.status), begun)
                    return None
                chunk = await response.content.readany()
                waits.close()
                self._begun(ask, target, response.status, begun)
                meter = Meter(stream=response.content_type == "text/event-stream")
                try:
                    await client.start(response, target)
                    armed = 0.0
                    while chunk:
                        meter.feed(chunk)
                        await client.pass_on(chunk)
                        now = loop.time()
                        if now - armed > _TICK_SECONDS:  # not with every token
                            armed = now
                            clock.reschedule(min(latest, now + settings.idle_seconds + _TICK_SECONDS))
                        chunk = await response.content.readany()
                finally:  # what was made counts, whoever broke off
                    if response.status == 200:
                        self._spent(ask, target, meter)
            failed = False if response.status < 500 else None
            await client.end()
            return response.status
        except _BROKEN as failure:
            if client.waiting:
                return await self._broken_off(ask, target, client, None, "the client reads too slowly")
            if isinstance(failure, aiohttp.ServerDisconnectedError) and response is None and len(target.replicas) == 1:
                raise _Stale from None
            late = isinstance(failure, TimeoutError) and not isinstance(failure, aiohttp.ClientError)
            failed = True
            self._failed(target, "timeout" if late else "connection", begun)
            if client.started:
                return await self._broken_off(ask, target, client, response, "the replica stopped answering")
            if late:
                message = f"no answer within {settings.first_byte_seconds:g} s"
                raise Refusal(504, message, code="timeout", kind="server_error") from None
            return None
        finally:
            waits.close()
            self._replicas.done(address, failed=failed)
            if response is not None:
                response.close()  # one that was read to its end has given its connection back already

    def _begun(self, ask: Ask, target: Target, status: int, begun: float) -> None:
        now = time.perf_counter()
        if status < 400:
            metrics.FIRST_TOKEN.labels(*labels(target)).observe(now - ask.arrived)
            self._board.count(target, now - begun, failed=False)
        elif status >= 500:
            self._failed(target, str(status), begun)

    def _failed(self, target: Target, reason: str, begun: float) -> None:
        metrics.FAILURES.labels(*labels(target), reason).inc()
        self._board.count(target, time.perf_counter() - begun, failed=True)

    def _spent(self, ask: Ask, target: Target, meter: Meter) -> None:
        usage, told = meter.usage(len(ask.body))
        for kind, tokens in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
            metrics.TOKENS.labels(*labels(target), ask.key_id, kind, "usage" if told else "estimate").inc(tokens)
        if self._ledger is not None:
            self._ledger.tokens(target, ask.key_id, ask.user, usage.prompt_tokens, usage.completion_tokens)
        if ask.key is not None:
            self._limits.spend(ask.key_id, ask.key.tokens_per_minute, usage.prompt_tokens + usage.completion_tokens)

    async def _broken_off(self, ask: Ask, target: Target, client: Client, response: aiohttp.ClientResponse | None, why: str) -> int:
        """A stream is told so, and ends; any other answer is cut off, so that nobody takes it for whole."""
        if self._ledger is not None:
            self._ledger.broken(target, ask.key_id, ask.user)
        if response is not None and response.content_type == "text/event-stream":
            await client.end(broken_stream(why))
            return 200
        raise CutOff(why)


class CutOff(Exception):
    """An answer that cannot be finished: its connection is to be closed."""


def labels(target: Target) -> tuple[str, str, str, str]:
    """Of a metric."""
    return (*target.endpoint, target.model, "" if target.version is None else str(target.version))

"""A replica that streams tokens at a pace, and clients that measure. Nothing but uvloop, so that what is measured is what is between.

The first event of a stream holds when the request came and when the event went, by the machine's monotonic clock: a client takes
that off its own time, and what is left is what the way took.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

FIRST, PACE, TOKENS = 0.05, 0.02, 40
"""Seconds until the first token, between tokens, and how many there are: an engine's on a middling GPU."""
_LENGTH = re.compile(rb"content-length: *(\d+)", re.I)
_STAMP = re.compile(rb'"stamp": ?\[(\d+), ?(\d+)\]')


class Replica(asyncio.Protocol):
    """HTTP/1.1, as much of it as a proxy sends. The name `at-once` is answered whole, without any pace."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport, self._data = transport, b""
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, _, body = self._data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return
        self._data = b""
        came, asked = time.monotonic_ns(), json.loads(body)
        if not asked.get("stream"):
            usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
            choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
            answer = {"id": "c", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice], "usage": usage}
            text = json.dumps(answer).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
            return
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._loop.call_later(FIRST, self._token, asked["model"], came, 0, self._loop.time() + FIRST)

    def _token(self, model: str, came: int, number: int, due: float) -> None:
        if self._transport.is_closing():
            return
        # in the text, which every proxy passes on
        text = "word " if number else f'"stamp":[{came},{time.monotonic_ns()}]'
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None if number < TOKENS - 1 else "stop"}
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        last = number == TOKENS - 1
        if last:
            data += b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n" % len(data) + data + b"\r\n" + (b"0\r\n\r\n" if last else b""))
        if not last:
            self._loop.call_at(due + PACE, self._token, model, came, number + 1, due + PACE)


class Hop(asyncio.Protocol):
    """A connection, and another one to the replica: bytes go through. No proxy in one process of Python can take less."""

    def __init__(self, port: int) -> None:
        self._port, self._waiting = port, b""
        self.other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if self._port:
            self._dialing = asyncio.ensure_future(self._dial())

    async def _dial(self) -> None:
        behind = Hop(0)
        behind.other = self._transport
        self.other, _ = await asyncio.get_running_loop().create_connection(lambda: behind, "127.0.0.1", self._port)
        self.other.write(self._waiting)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._waiting += data
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


@dataclass
class Result:
    """Of one load."""

    added: list[float] = field(default_factory=list)
    """Seconds until the first token, less those that the replica took."""
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """In milliseconds, and by second."""
        found: dict[str, Any] = {"requests": self.requests, "failed": self.failed, "requests/s": round(self.requests / self.seconds, 1)}
        if self.added:
            ordered = sorted(self.added)
            found["p50 ms"] = round(1000 * ordered[len(ordered) // 2], 2)
            found["p99 ms"] = round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2)
            found["tokens/s"] = round(self.tokens / self.seconds)
        return found


async def _client(port: int, token: str, model: str, *, stream: bool, until: float, result: Result, wait: float) -> None:
    await asyncio.sleep(wait)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "word " * 200}], "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        begun = time.monotonic_ns()
        writer.write(request)
        data, first = b"", 0
        while not _is_whole(data):
            more = await reader.read(65536)
            if not more:
                raise ConnectionError(f"broken off after {data[-300:]!r}")
            if not first and b"data: " in more:
                first = time.monotonic_ns()
            data += more
        if not data.startswith(b"HTTP/1.1 200"):
            result.failed += 1
            if result.failed == 1:
                print(data[:500], file=sys.stderr)
            await asyncio.sleep(0.1)
            continue
        result.requests += 1
        if stream and (stamp := _STAMP.search(data.replace(b"\\", b""))):
            result.added.append((first - begun - int(stamp[2]) + int(stamp[1])) / 1e9)
            result.tokens += data.count(b"data: {")
    writer.close()


def _is_whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    length = _LENGTH.search(head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


async def load(port: int, token: str, model: str, *, clients: int, seconds: float, stream: bool) -> Result:
    """So many clients, one request of each after the other; they begin spread over the time of an answer."""
    result, begun = Result(), time.monotonic()
    spread = (FIRST + PACE * TOKENS) / clients if stream else 0.0
    ways = (
        _client(port, token, model, stream=stream, until=begun + seconds, result=result, wait=number * spread) for number in range(clients)
    )
    await asyncio.gather(*ways)
    result.seconds = time.monotonic() - begun
    return result


async def _serve(port: int, protocol: Callable[[], asyncio.Protocol]) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """`replica PORT`, `hop PORT REPLICA`, or `load PORT TOKEN MODEL CLIENTS SECONDS stream|whole`, which prints JSON."""
    what, port, *rest = sys.argv[1:]
    if what == "replica":
        uvloop.run(_serve(int(port), Replica))
        return
    if what == "hop":
        uvloop.run(_serve(int(port), lambda: Hop(int(rest[0]))))
        return
    token, model, clients, seconds, how = rest
    found = uvloop.run(load(int(port), token, model, clients=int(clients), seconds=float(seconds), stream=how == "stream"))
    print(json.dumps(found.told()))


if __name__ == "__main__":
    main()

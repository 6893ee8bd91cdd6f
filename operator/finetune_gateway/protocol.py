"""What uvicorn leaves open at the edge of HTTP: connections that send nothing or drip, too many of them, headers without an end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def guarded(header_bytes: int, header_seconds: float, connections: int) -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits: of a request's line and headers their size (400, 431) and time (408); of connections (503).

    uvicorn's own `limit_concurrency` would refuse every request while there are that many connections, idle ones too.
    """

    class Guarded(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._since: asyncio.TimerHandle | None = None
            self._bytes = 0
            self._whole = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                self._end(b"503 Service Unavailable")
            self._await_headers()

        def _await_headers(self) -> None:
            self._whole, self._bytes = False, 0
            if self._since is None:
                self._since = self.loop.call_later(header_seconds, self._end, b"408 Request Timeout")

        def connection_lost(self, exc: Exception | None) -> None:
            self._settle()
            super().connection_lost(exc)

        def _settle(self) -> None:
            if self._since is not None:
                self._since.cancel()
                self._since = None

        def data_received(self, data: bytes) -> None:
            if not self._whole or (self.cycle is not None and not self.cycle.more_body):
                if self._whole:
                    self._await_headers()
                self._bytes += len(data)
            super().data_received(data)
            if not self._whole and self._bytes > header_bytes and not self.transport.is_closing():
                self._end(b"431 Request Header Fields Too Large")

        def on_headers_complete(self) -> None:
            if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > header_bytes:
                raise ValueError("the headers are too long")  # the parser gives up, and uvicorn answers 400
            self._whole = True
            self._settle()
            super().on_headers_complete()

        def _end(self, status: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()

    return Guarded

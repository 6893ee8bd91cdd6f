"""The gateway's parts, put together; what it sees of the cluster is put in from outside."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import uvicorn

from .access import Access, Reviews
from .catalog import Catalog
from .choosing import Replicas
from .counting import CanaryBoard, Limits
from .keys import Keys
from .ledger import Ledger
from .protocol import guarded
from .proxy import Proxy
from .relay import Relay, session
from .server import Edge, operators, users
from .settings import Settings
from .usage import Reports

if TYPE_CHECKING:
    from .store.keeper import Store
    from .tuning.parts import Tuning

_TIDY_SECONDS = 30.0


class Gateway:
    """To be made within a running loop."""

    def __init__(self, settings: Settings, reviews: Reviews, not_ready: Callable[[], str], kubernetes: Any = None) -> None:
        """`kubernetes`: the API server, for the fine-tuning API. Raises ValueError where its model map cannot be read."""
        self.catalog, self.keys, self._board = Catalog(), Keys(), CanaryBoard()
        self._settings = settings
        self._connections = session(settings)
        self._replicas = Replicas(time.monotonic, random.random)
        self._limits = Limits(time.monotonic, 1 / settings.replicas)
        access = Access(reviews, self.keys, settings.audience, time.monotonic, lambda: datetime.now(UTC))
        ledger = Ledger(lambda: datetime.now(UTC).date()) if settings.database else None
        self.store = _store(settings, ledger) if ledger is not None else None
        relay = Relay(self._replicas, self._limits, self._board, ledger, settings, self._connections)
        self.tuning = _tuning(settings, self.store, access, kubernetes) if settings.fine_tuning_models else None
        resolve = self.tuning.resolve if self.tuning is not None else lambda model: None
        proxy = Proxy(self.catalog, access, self._limits, relay, ledger, settings, resolve)
        self._not_ready = not_ready
        api = self.tuning.api(proxy.caller) if self.tuning is not None else None
        self._users = users(proxy, Reports(self.store, access), not_ready, api)

    def servers(self) -> list[uvicorn.Server]:
        """Of users, and of operators; neither sees to signals."""
        settings = self._settings
        seen = operators(self.catalog, self._replicas, self._board, self._not_ready)
        return [
            _server(Edge(self._users), settings, settings.port),
            _server(seen, settings, settings.metrics_port),
        ]

    async def tidy(self) -> None:
        """Forget what is not there any more. Until cancelled."""
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            self._replicas.forget(self.catalog.addresses())
            self._limits.forget({identifier for identifier, _ in self.keys.known.values()})
            if self.tuning is not None:
                self.tuning.tidy()

    async def close(self) -> None:
        """Close the connections to replicas; what was counted is written."""
        if self.tuning is not None:
            await self.tuning.close()
        if self.store is not None:
            await self.store.close()
        await self._connections.close()


def _store(settings: Settings, ledger: Ledger) -> Store:
    from .store.keeper import Store  # a quarter of the gateway's memory: for those who have one

    return Store(settings, ledger)


def _tuning(settings: Settings, store: Store | None, access: Access, kubernetes: Any) -> Tuning:
    from .tuning.parts import Tuning  # boto3 and pydantic's models: for those who have it

    assert store is not None
    return Tuning(settings, store, access, kubernetes)


def _server(app: Any, settings: Settings, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        http=guarded(settings.header_bytes, settings.header_seconds, settings.connections),
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(settings.keep_alive_seconds),
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    return server

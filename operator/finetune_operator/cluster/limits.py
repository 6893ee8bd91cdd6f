"""How many requests a second the operator may send, and who goes first when it must wait. Knows nothing of the requests."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from enum import IntEnum


class Priority(IntEnum):
    """What goes first, for a while. Within one kind, who asked first."""

    ACT = 0
    """Pods and Jobs made and deleted: GPUs are held or wanted."""
    TELL = 1
    """Status that says where a job stands."""
    LOOK = 2
    """Events, reads, token reviews, and progress, of which a later one tells more."""


AGEING_SECONDS = 10.0
"""A request is passed by those of the next higher kind that come within so many seconds, and not for longer"""


class RateLimit:
    """A token bucket with priorities that age: `qps` requests a second in the long run, `burst` at once."""

    def __init__(self, qps: float, burst: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._qps, self._burst, self._monotonic = qps, burst, monotonic
        self._tokens, self._filled = float(burst), monotonic()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._pump: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def acquire(self, priority: Priority) -> None:
        """Wait for one's turn."""
        self._fill()
        if not self._waiting and self._tokens >= 1:
            self._tokens -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self._filled + priority * AGEING_SECONDS, next(self._order), turn))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._serve(), name="rate-limit")
        await turn

    def _fill(self) -> None:
        now = self._monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._filled) * self._qps)
        self._filled = now

    async def _serve(self) -> None:
        while self._waiting:
            self._fill()
            if self._tokens < 1:
                await asyncio.sleep((1 - self._tokens) / self._qps)
                continue
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():  # whoever gave up waiting takes nothing
                self._tokens -= 1
                turn.set_result(None)

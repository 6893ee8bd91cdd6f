"""A keyed work queue: one key is never worked on twice at once, a failed key comes back later, none blocks another.

The semantics are those of client-go's workqueue: keys added while they are being worked on are worked on again
afterwards, however often they were added. Keys have a rank, as in controller-runtime's priority queue, but those of a
high one never take all turns.
Knows nothing of what the keys name.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeAlias, TypeVar

K = TypeVar("K", bound=Hashable)
_BASE, _LIMIT = 0.5, 120.0
_IN_A_ROW = 4
"""Urgent keys before another one has its turn; of those, every fourth turn is the oldest's"""
_Entry: TypeAlias = tuple[tuple[int, ...], int, K]
"""Rank in descending order, number, key"""
_Line: TypeAlias = list[_Entry[K]] | deque[_Entry[K]]


class WorkQueue(Generic[K]):
    """Keys waiting, being worked on, and due later. `rank` is asked whenever a key is added: the highest goes first.

    Keys whose rank begins with more than 0 are urgent: while any of them wait, all others have a fifth of the turns.
    """

    def __init__(self, rank: Callable[[K], tuple[int, ...]] = lambda key: ()) -> None:
        self._rank = rank
        self._urgent: list[_Entry[K]] = []
        self._others: list[_Entry[K]] = []
        """Keys that wait, by descending rank, then by age: those that are urgent, and the others"""
        self._oldest: deque[_Entry[K]] = deque()
        """All of them by age"""
        self._queued: dict[K, tuple[tuple[int, ...], int]] = {}
        """Keys that wait: their rank, and the number of their entry"""
        self._in_a_row = self._turn = 0
        self._active: set[K] = set()
        self._again: set[K] = set()
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()
        self._count = 0

    def add(self, key: K) -> None:
        """Work on the key as soon as a worker is free."""
        if key in self._active:
            self._again.add(key)
            return
        rank, known = self._rank(key), self._queued.get(key)
        if known is None or rank > known[0]:
            self._count += 1
            number = known[1] if known is not None else self._count  # it keeps its age
            self._queued[key] = rank, number
            heapq.heappush(self._urgent if rank[:1] > (0,) else self._others, (tuple(-r for r in rank), number, key))
            if known is None:
                self._oldest.append(((), number, key))
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Work on the key in so many seconds, or earlier when something else asks for it."""
        due = time.monotonic() + max(0.0, seconds)
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._later, (due, self._count, key))
        self._wake.set()

    def retry(self, key: K) -> float:
        """Work on a failed key again after a back-off with jitter; returns the delay in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay: float = min(_LIMIT, _BASE * 2.0 ** min(failures - 1, 20)) * (0.5 + random.random())
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """The key was worked on successfully: its next failure starts at the first back-off."""
        self._failures.pop(key, None)

    def __len__(self) -> int:
        return len(self._queued) + len(self._active)

    def _pop(self) -> K | None:
        for line in (self._urgent, self._others, self._oldest):
            self._drop_stale(line)
        if self._urgent and not (self._others and self._in_a_row >= _IN_A_ROW):
            self._in_a_row += 1
            return self._take(self._urgent)
        if not self._others:
            return None
        self._in_a_row = 0
        self._turn = (self._turn + 1) % _IN_A_ROW
        return self._take(self._others if self._turn else self._oldest)

    def _take(self, line: _Line[K]) -> K:
        key = line[0][-1]
        del self._queued[key]
        return key

    def _drop_stale(self, line: _Line[K]) -> None:
        """Drop the entries at the front of a line whose key went by another one."""
        while line and ((known := self._queued.get(line[0][-1])) is None or known[1] != line[0][-2]):
            if isinstance(line, deque):
                line.popleft()
            else:
                heapq.heappop(line)

    async def _next(self) -> K:
        while True:
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                due, _, key = heapq.heappop(self._later)
                if self._due.get(key) == due:
                    del self._due[key]
                    self.add(key)
            if (ready := self._pop()) is not None:
                self._active.add(ready)
                return ready
            self._wake.clear()
            timeout = self._later[0][0] - now if self._later else None
            try:
                async with asyncio.timeout(timeout):  # wait_for of Python 3.11 may swallow a cancellation
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _done(self, key: K) -> None:
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    async def run(self, work: Callable[[K], Awaitable[None]], workers: int) -> None:
        """Work until cancelled. `work` handles its own failures."""

        async def worker() -> None:
            while True:
                key = await self._next()
                self._wake.set()  # pass it on: several keys may have become ready at once
                try:
                    await work(key)
                finally:
                    self._done(key)

        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())

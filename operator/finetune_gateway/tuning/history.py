"""What the watch tells of jobs goes into the store, so that their whole history can be read. No request waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from typing import Any

from ..store import history as table
from ..store.keeper import Store, StoreAway
from .events import Event, events_of
from .jobs import Job, Jobs

log = logging.getLogger("finetune.gateway")
_SECONDS = 2.0
_MOST = 20_000
"""Events that wait for the store; what comes beyond is lost, unless the job still tells it later."""
_AT_ONCE = 500
_DAY = 86_400


class History:
    """Collects events, and writes them every two seconds."""

    def __init__(self, store: Store, days: int) -> None:
        """`days`: how long events are kept; 0: for ever."""
        self._store, self._days = store, days
        self._waiting: dict[str, Event] = {}
        self._told: dict[str, frozenset[str]] = {}
        self._tidied = 0.0

    def see(self, job: Job) -> None:
        """A job that has come, or is different."""
        events = events_of(job)
        before = self._told.get(job.uid, frozenset())
        for event in events:
            if event.id not in before and len(self._waiting) < _MOST:
                self._waiting[event.id] = event
        self._told[job.uid] = frozenset(event.id for event in events)

    def forget(self, jobs: Jobs) -> None:
        """Jobs that are gone have nothing more to tell."""
        self._told = {uid: told for uid, told in self._told.items() if jobs.knows(uid)}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. What the store does not take stays."""
        try:
            while self._waiting:
                batch = list(self._waiting.values())[:_AT_ONCE]
                rows = [asdict(event) for event in batch]
                await self._store.write(lambda connection, rows=rows: table.add(connection, rows))  # type: ignore[misc]
                for event in batch:
                    self._waiting.pop(event.id, None)
            if self._days and (not self._tidied or time.monotonic() - self._tidied > _DAY):
                before = int(time.time()) - self._days * _DAY
                await self._store.write(lambda connection: table.forget(connection, before))
                self._tidied = time.monotonic()
        except StoreAway:
            return

    async def page(self, job: Job, after: str | None, limit: int, kind: str = "") -> tuple[list[Event], bool] | None:
        """Newest first, and whether there are more; None where `after` is no event of the job. Raises StoreAway."""
        await self.flush()
        found = await self._store.read(lambda connection: table.page(connection, job.uid, after, limit + 1, kind))
        return None if found is None else ([_event(row) for row in found[:limit]], len(found) > limit)

    async def points(self, job: Job) -> list[Event]:
        """Step metrics, oldest first. Raises StoreAway."""
        await self.flush()
        return [_event(row) for row in await self._store.read(lambda connection: table.points(connection, job.uid))]


def _event(row: Any) -> Event:
    return Event(**row)

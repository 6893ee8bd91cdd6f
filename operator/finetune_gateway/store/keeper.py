"""Keeps the store: writes what the ledger has counted every few seconds, and reads, in threads. No request waits for it.

A store that is away is asked again; what it has not taken stays in memory, a bounded number of rows, and is told by metrics.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError

from finetune_api.usage import UsageRow

from .. import metrics
from ..ledger import Amount, Ledger, Use
from ..settings import Settings
from . import usage
from .database import engine_of, migrate

log = logging.getLogger("finetune.gateway")
T = TypeVar("T")
_MOST_PAUSE = 60.0
_LAST_SECONDS = 3.0
"""That the end of the gateway waits for the store."""
_READ_SECONDS = 20.0
_READERS = 2


class StoreAway(Exception):
    """It does not answer now."""


def today() -> date:
    """In UTC."""
    return datetime.now(UTC).date()


class Store:
    """One writer, and readers beside it."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        """Raises ValueError where the URL is none; nothing is connected yet."""
        self._engine = engine_of(settings.database)
        self._ledger, self._seconds, self._days = ledger, settings.flush_seconds, settings.usage_days
        self._writing = ThreadPoolExecutor(1, "store-writer")
        self._reading = ThreadPoolExecutor(_READERS, "store-reader")
        self._id, self._number = uuid.uuid4().hex, 0
        self._batch: Sequence[tuple[Use, Amount]] = ()
        """Taken from the ledger, and not acknowledged yet."""
        self._migrated = False
        self._tidied: date | None = None
        self._failures = self._told_lost = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            written = await self.flush()
            await asyncio.sleep(self._seconds if written else min(_MOST_PAUSE, self._seconds * 2 ** min(self._failures, 10)))

    async def flush(self) -> bool:
        """Write what was counted. False where the store is away: the same batch is tried again, and counts once."""
        if not self._batch:
            self._batch = self._ledger.take()
            self._number += bool(self._batch)
        batch, number = self._batch, self._number
        try:
            if batch or not self._migrated or self._tidied != today():
                await asyncio.get_running_loop().run_in_executor(self._writing, self._write, number, batch)
            self._well()
            self._batch = ()
        except DataError as failure:
            lost = sum(amount.requests for _, amount in batch)
            log.error("the store does not take what was counted of %d requests: %s", lost, _why(failure))
            metrics.USAGE_LOST.inc(lost)
            self._batch = ()
        except (SQLAlchemyError, OSError) as failure:
            self._away(failure)
            return False
        finally:
            self._tell()
        return True

    def _write(self, number: int, batch: Sequence[tuple[Use, Amount]]) -> None:
        if not self._migrated:
            later = migrate(self._engine)
            if later is not None:
                log.warning("the store has the tables of a later release (%s)", later)
            self._migrated = True
        day = today()
        with self._engine.begin() as connection:
            if batch:
                usage.add(connection, self._id, number, batch, day)
            if self._tidied != day:
                usage.forget(connection, day, self._days)
        self._tidied = day

    def _well(self) -> None:
        if self._failures:
            log.info("the store answers again")
        self._failures = 0

    def _away(self, failure: Exception) -> None:
        metrics.STORE_FAILURES.inc()
        if not self._failures:
            log.warning("the store does not answer; usage is kept in memory until it does: %s", _why(failure))
        self._failures += 1

    def _tell(self) -> None:
        metrics.USAGE_LOST.inc(self._ledger.lost - self._told_lost)
        self._told_lost = self._ledger.lost
        metrics.USAGE_PENDING.set(self._ledger.requests + sum(amount.requests for _, amount in self._batch))

    async def namespaces(self, since: date) -> list[str]:
        """In which anything was used since then. Raises StoreAway."""
        return await self.read(lambda connection: usage.namespaces(connection, since))

    async def rows(self, query: usage.Query, seen: usage.Seen) -> list[UsageRow]:
        """What was used, but for the last seconds. Raises StoreAway."""
        return await self.read(lambda connection: usage.rows(connection, query, seen))

    async def read(self, what: Callable[[Connection], T]) -> T:
        """Do it in a transaction of its own. Raises StoreAway."""
        return await self._within(self._reading, what)

    async def write(self, what: Callable[[Connection], T]) -> T:
        """The same, one after the other. What takes too long may be done nevertheless. Raises StoreAway."""
        return await self._within(self._writing, what)

    async def _within(self, threads: ThreadPoolExecutor, what: Callable[[Connection], T]) -> T:
        def do() -> T:
            with self._engine.begin() as connection:
                return what(connection)

        if not self._migrated:
            raise StoreAway("it was not reached yet")
        try:
            async with asyncio.timeout(_READ_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(threads, do)
        except (SQLAlchemyError, OSError, TimeoutError) as failure:
            log.warning("the store does not answer: %s", _why(failure))
            raise StoreAway("it does not answer") from None

    async def close(self) -> None:
        """Write what is left, if that takes no longer than a moment."""
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                while await self.flush() and self._ledger.requests:
                    pass
        except TimeoutError:
            pass
        left = self._ledger.requests + sum(amount.requests for _, amount in self._batch)
        if left:
            log.error("the store did not answer: what was counted of %d requests is lost, unless it was written just now", left)
        for threads in (self._writing, self._reading):
            threads.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()


def _why(failure: Exception) -> str:
    """Without statements and their values; a driver tells no password."""
    cause = failure.orig if isinstance(failure, DBAPIError) and failure.orig is not None else failure
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"

"""The one loop: a key -> observe -> reconcile -> write.

A kind is a row of functions (`Kind`); it has no loop of its own. Knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from finetune_api.base import shortened

from .. import metrics, tracing
from ..cluster.errors import APIError
from ..logs import JOB
from ..model.objects import Key, Object
from ..reconcile.plan import Plan
from .workqueue import WorkQueue
from .writer import Writer

log = logging.getLogger("finetune.controller")


class Observation(Protocol):
    """What a decision about an object depends on."""

    @property
    def raw(self) -> Object:
        """The object itself."""


O = TypeVar("O", bound=Observation)  # noqa: E741


@dataclass(frozen=True)
class Kind(Generic[O]):
    """A kind that is reconciled."""

    name: str
    observe: Callable[[Key], Awaitable[O | None]]
    """Everything that a decision about the object may depend on; None when it is gone or not to be decided about. Raises APIError."""
    reconcile: Callable[[O], Plan]
    refused: Callable[[O, str], Plan]
    """What to say when the API server refuses, for good and with this message, what was to be done."""
    unreadable: Callable[[Key, str], tuple[Object, Plan] | None] = lambda key, why: None
    """The object, and how it says that it cannot be worked on as it is; None when it is gone."""
    rank: Callable[[Key], tuple[int, ...]] = lambda key: ()
    recorded: Callable[[Object, Plan], None] = lambda raw, plan: None
    """Told when a status was written: the object as it was before, and the plan."""
    not_recorded: Callable[[O, str], None] = lambda observed, why: None
    touched: Callable[[str, Object], Iterable[Key]] = lambda kind, raw: ()
    """Keys that are to be looked at when an object of another kind, as given, is different now, or gone."""
    depends_on: tuple[str, ...] | None = None
    """Other kinds that `touched` is told of; None: all."""


class Controller(Generic[O]):
    """Works on the keys of one kind. `may_act`: whether this process may write, asked before every pass."""

    def __init__(self, kind: Kind[O], writer: Writer, may_act: Callable[[], bool] = lambda: True) -> None:
        self.kind, self.writer, self._may_act = kind, writer, may_act
        self.queue: WorkQueue[Key] = WorkQueue(kind.rank)

    async def run(self, workers: int) -> None:
        """Work until cancelled."""
        await self.queue.run(self.process, workers)

    async def process(self, key: Key) -> None:
        """One pass over one object. Any failure puts the key back with back-off."""
        if not self._may_act():  # this process was frozen: the next renewal of its lease tells
            self.queue.add_after(key, 1.0)
            return
        started = time.monotonic()
        JOB.set("/".join(key))
        try:
            with tracing.span("reconcile", namespace=key[0], job=key[1]):
                await self._pass(key)
            self.queue.forget(key)
        except APIError as failure:
            self._failed(key, metrics.api_reason(failure.reason), str(failure), expected=failure.conflict or failure.transient)
        except Exception as failure:
            log.exception("%s/%s: pass failed", *key)
            await self._tell_unreadable(key, failure)
            self._failed(key, type(failure).__name__, str(failure), expected=False)
        finally:
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
            metrics.QUEUE_DEPTH.labels(kind=self.kind.name).set(len(self.queue))

    async def _pass(self, key: Key) -> None:
        observed = await self.kind.observe(key)
        if observed is None:
            return
        with tracing.span("decide"):
            plan = self.kind.reconcile(observed)
        try:
            again = await self.writer.write(observed.raw, plan, lambda why: self.kind.refused(observed, why), self.kind.recorded)
        except APIError as failure:
            self.kind.not_recorded(observed, str(failure))
            raise
        if again == 0.0:
            self.queue.add(key)
        elif again is not None:
            self.queue.add_after(key, again)

    async def _tell_unreadable(self, key: Key, failure: Exception) -> None:
        """One object that cannot be worked on says so, the others go on; that this may fail, too, must not hide why."""
        with contextlib.suppress(Exception):
            if (told := self.kind.unreadable(key, shortened(f"{type(failure).__name__}: {failure}", 500))) is not None:
                await self.writer.write(*told, lambda why: Plan(), lambda raw, plan: None)

    def _failed(self, key: Key, reason: str, message: str, *, expected: bool) -> None:
        metrics.RECONCILE_ERRORS.labels(reason=reason).inc()
        delay = self.queue.retry(key)
        log.log(logging.INFO if expected else logging.WARNING, "%s/%s: again in %.1f s: %s", *key, delay, message)

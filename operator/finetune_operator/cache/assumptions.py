"""What was decided about jobs, or told by one loop to another, and is not on record yet.

As Kueue's scheduler does, what is decided is assumed to hold until the record shows it, so that nothing is given twice: the
admission loop reads a snapshot of what was seen with what is assumed, decides, and notes it here; a job's own pass reads it here
and puts it on record, conditionally. Everything is kept by the job's UID: a job made anew under the same name inherits nothing.
An assumption that does not come on record for EXPIRES_SECONDS is given up, since it would hold quota for ever.

Knows nothing of the API server: all of it can be lost at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..model.queueing import Decision

EXPIRES_SECONDS = 180.0
"""Longer than a request with all its tries may last: what has expired is not written any more"""
_BACKOFF_SECONDS, _BACKOFF_LIMIT = 60.0, 3600.0
"""How long a job whose decision did not come on record is passed over; doubles each time"""
_HELD = ("admit", "preempt", "resize")
"""Decisions that change who holds what"""


@dataclass(frozen=True)
class Expired:
    """A decision that did not come on record."""

    uid: str
    decision: Decision
    why: str
    """What was said to the last try to put it there"""
    again_in: float
    """Seconds until the job is decided about again"""


class Assumptions:
    """One for an operator. `changed` is called when a job is told that it waits for its turn, or something came on record."""

    def __init__(self, changed: Callable[[], None] = lambda: None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._changed, self._monotonic = changed, monotonic
        self._decisions: dict[str, Decision] = {}
        self._held: dict[str, float] = {}
        """Those of them that change who holds what and are not on record: since when"""
        self._ready: set[str] = set()
        self._why: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def decision(self, uid: str) -> Decision | None:
        """What is decided about a job; None before it was looked at."""
        return self._decisions.get(uid)

    def decide(self, uid: str, decision: Decision | None) -> None:
        """Note what is decided about a job; None: nothing. What is assumed to hold stays until it is on record or expires."""
        if uid in self._held:
            return
        if decision is None:
            self._decisions.pop(uid, None)
            return
        self._decisions[uid] = decision
        if decision.action in _HELD:
            self._held[uid] = self._monotonic()

    def held(self, uid: str) -> Decision | None:
        """The admission, eviction or growth that is assumed to hold."""
        return self._decisions.get(uid) if uid in self._held else None

    @property
    def backlog(self) -> int:
        """Admissions, evictions and growths that are not on record yet."""
        return len(self._held)

    def waits_for_decisions(self) -> bool:
        """Whether any job waits for something that time or others may bring."""
        return any(decision.action == "wait" for decision in self._decisions.values())

    def confirm(self, uid: str) -> None:
        """What was seen of the job shows that its decision is on record, or came to nothing."""
        self._held.pop(uid, None)
        self._failures.pop(uid, None)
        self._why.pop(uid, None)

    def recorded(self, uid: str) -> None:
        """The job's status was written: a decision that changes something is used up, and is not carried out twice."""
        if uid in self._held:
            self._decisions.pop(uid, None)
        self._ready.discard(uid)
        self.confirm(uid)
        self._changed()

    def not_recorded(self, uid: str, why: str) -> None:
        """The job's status could not be written."""
        if uid in self._held:
            self._why[uid] = why

    def wait(self, uid: str) -> bool:
        """A job waits for its turn, though its status does not say so yet. Whether that is news."""
        if uid in self._ready:
            return False
        self._ready.add(uid)
        self._changed()
        return True

    def is_ready(self, uid: str) -> bool:
        """Whether it said that it waits for its turn."""
        return uid in self._ready

    def may_be_decided(self, uid: str) -> bool:
        """Whether it is not passed over because decisions about it did not come on record."""
        return self._not_before.get(uid, float("-inf")) <= self._monotonic()

    def expire(self) -> list[Expired]:
        """Give up what did not come on record for too long."""
        now = self._monotonic()
        gone = []
        for uid in [uid for uid, since in self._held.items() if now - since >= EXPIRES_SECONDS]:
            del self._held[uid]
            failures = self._failures[uid] = self._failures.get(uid, 0) + 1
            wait = min(_BACKOFF_LIMIT, _BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20))
            self._not_before[uid] = now + wait
            gone.append(Expired(uid, self._decisions.pop(uid), self._why.pop(uid, "its status was not written"), wait))
        return gone

    def forget(self, uid: str) -> None:
        """The job is gone."""
        for known in (self._decisions, self._held, self._why, self._failures, self._not_before):
            known.pop(uid, None)  # type: ignore[attr-defined]
        self._ready.discard(uid)

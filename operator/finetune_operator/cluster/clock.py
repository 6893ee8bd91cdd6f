"""The API server's time: ages and time-outs are not to depend on the clock of the node that the operator runs on.

Knows nothing of who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

_TOLERANCE = 2.0
"""Seconds. The Date header has whole seconds, and answers take their time."""


class ServerClock:
    """Runs on the monotonic clock from the last Date header that told another time; on the local clock before the first."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._base = datetime.now(UTC) - timedelta(seconds=monotonic())
        self._last: str | None = None

    def heard(self, date: str | None) -> None:
        """Take the Date header of an answer (RFC 9110, section 6.6.1)."""
        if not date or date == self._last:  # of a second's many answers, one tells
            return
        self._last = date
        try:
            told = parsedate_to_datetime(date).astimezone(UTC)
        except (ValueError, TypeError):
            return
        if abs((told - self.now()).total_seconds()) > _TOLERANCE:
            self._base = told - timedelta(seconds=self._monotonic())

    def now(self) -> datetime:
        """The time in UTC."""
        return self._base + timedelta(seconds=self._monotonic())

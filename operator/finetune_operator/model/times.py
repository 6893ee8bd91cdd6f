"""Times as the Kubernetes API writes them. Knows nothing of where they stand."""

from __future__ import annotations

from datetime import UTC, datetime

_SKEW = 60.0
"""Seconds that clocks of nodes may be ahead."""


def is_within(seconds: float, since: datetime, now: datetime) -> bool:
    """Whether it began less than so many seconds ago. What seems to lie in the future was told by a wrong clock: not waited for."""
    return -_SKEW <= (now - since).total_seconds() < seconds


def rfc3339(moment: datetime) -> str:
    """A time as the Kubernetes API writes it, whole seconds in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> datetime | None:
    """A time from the Kubernetes API, or None when absent or unreadable."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

"""The history of jobs: events, each kept once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, literal, select, tuple_

from .tables import EVENTS
from .usage import insert_into


def add(connection: Connection, events: Sequence[dict[str, Any]]) -> None:
    """Those that are there already stay as they are."""
    if events:
        connection.execute(insert_into(connection, EVENTS).on_conflict_do_nothing(index_elements=[EVENTS.c.id]), list(events))


def page(connection: Connection, job: str, after: str | None, limit: int, kind: str = "") -> list[RowMapping] | None:
    """Newest first, at most `limit`, those before the event `after`; None where that is no event of the job."""
    c = EVENTS.c
    wanted = [c.job == job, *([c.type == kind] if kind else [])]
    if after is not None:
        last = connection.execute(select(EVENTS).where(c.job == job, c.id == after)).first()
        if last is None:
            return None
        place = tuple_(c.created_at, c.position, c.id)
        wanted.append(place < tuple_(literal(last.created_at), literal(last.position), literal(last.id)))
    order = (c.created_at.desc(), c.position.desc(), c.id.desc())
    return [row._mapping for row in connection.execute(select(EVENTS).where(*wanted).order_by(*order).limit(limit))]


def points(connection: Connection, job: str) -> list[RowMapping]:
    """Step metrics, oldest first."""
    c = EVENTS.c
    found = connection.execute(select(EVENTS).where(c.job == job, c.type == "metrics").order_by(c.created_at, c.position))
    return [row._mapping for row in found]


def forget(connection: Connection, before: int) -> None:
    """Events from before that time, in seconds since 1970."""
    connection.execute(delete(EVENTS).where(EVENTS.c.created_at < before))

"""Use of models in the store: added in batches, each once; and read by those who may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, false, or_, select, true
from sqlalchemy.dialects import postgresql, sqlite

from finetune_api.usage import UsageRow

from ..ledger import Amount, Use
from .tables import COUNTS, USAGE, WRITERS

MOST_ROWS = 10_000
"""Of one answer."""
_WRITER_DAYS = 30
"""A process that was silent for so long comes with no batch of before."""


@dataclass(frozen=True)
class Seen:
    """What a caller may see: all of some namespaces, and what they asked themselves."""

    namespaces: frozenset[str]
    key: str
    user: str
    of: str = ""
    """The namespace of the key: another one may have had its id before."""


@dataclass(frozen=True)
class Query:
    """What is asked for; empty and None: any."""

    since: date
    namespace: str = ""
    model: str = ""
    version: int | None = None
    key: str = ""
    user: str = ""


def insert_into(connection: Connection, table: Any) -> Any:
    """An INSERT that knows ON CONFLICT, in the same words for both."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)


def add(connection: Connection, writer: str, number: int, rows: Sequence[tuple[Use, Amount]], today: date) -> bool:
    """Add a writer's batch. False where it is in already: it was written, and the writer did not hear of it."""
    mark = insert_into(connection, WRITERS).values(id=writer, last=number, seen=today)
    mark = mark.on_conflict_do_update(
        index_elements=[WRITERS.c.id],
        set_={"last": mark.excluded.last, "seen": mark.excluded.seen},
        where=WRITERS.c.last < mark.excluded.last,
    ).returning(WRITERS.c.last)
    if connection.execute(mark).first() is None:
        return False
    more = insert_into(connection, USAGE)
    more = more.on_conflict_do_update(
        index_elements=list(USAGE.primary_key), set_={name: USAGE.c[name] + more.excluded[name] for name in COUNTS}
    )
    if rows:
        connection.execute(more, [{**use._asdict(), **{name: getattr(amount, name) for name in COUNTS}} for use, amount in rows])
    return True


def forget(connection: Connection, today: date, days: int) -> None:
    """Remove what is older than so many days, unless 0, and writers that have long ended."""
    connection.execute(delete(WRITERS).where(WRITERS.c.seen < today - timedelta(days=_WRITER_DAYS)))
    if days:
        connection.execute(delete(USAGE).where(USAGE.c.day < today - timedelta(days=days)))


def namespaces(connection: Connection, since: date) -> list[str]:
    """In which anything was used since then."""
    return list(connection.scalars(select(USAGE.c.namespace).where(USAGE.c.day >= since).distinct()))


def rows(connection: Connection, query: Query, seen: Seen) -> list[UsageRow]:
    """In order, of which at most one more than MOST_ROWS."""
    return [
        UsageRow(**{**found._mapping, "day": found.day.isoformat(), "version": found.version or None})
        for found in connection.execute(_selected(query, seen).limit(MOST_ROWS + 1))
    ]


def _selected(query: Query, seen: Seen) -> Select[Any]:
    c = USAGE.c
    own = and_(c.key == seen.key, c.user == seen.user, c.namespace == seen.of if seen.of else true())
    asked = [c[name] == getattr(query, name) for name in ("namespace", "model", "key", "user") if getattr(query, name)]
    if query.version is not None:
        asked.append(c.version == query.version)
    visible = or_(c.namespace.in_(sorted(seen.namespaces)) if seen.namespaces else false(), own)
    return select(USAGE).where(c.day >= query.since, visible, *asked).order_by(*USAGE.primary_key)

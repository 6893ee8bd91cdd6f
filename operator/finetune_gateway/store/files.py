"""Metadata of the fine-tuning API's files. Each function is one transaction's part; callers say whose namespace it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, func, insert, literal, select, tuple_

from .tables import FILES


@dataclass(frozen=True)
class File:
    """A row."""

    id: str
    namespace: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    digest: str
    form: str
    rows: int
    problem: str


def add(connection: Connection, file: File) -> None:
    """A new one."""
    connection.execute(insert(FILES).values(**asdict(file)))


def find(connection: Connection, namespace: str, identifier: str) -> File | None:
    """None for what is not there, or is another namespace's."""
    row = connection.execute(select(FILES).where(FILES.c.id == identifier, FILES.c.namespace == namespace)).first()
    return File(**row._mapping) if row is not None else None


def page(connection: Connection, namespace: str, after: File | None, limit: int, purpose: str, *, ascending: bool) -> list[File]:
    """In the order of their making, newest first unless told otherwise; at most `limit`, those after that one."""
    c = FILES.c
    wanted = [c.namespace == namespace, *([c.purpose == purpose] if purpose else [])]
    if after is not None:
        place, last = tuple_(c.created_at, c.id), tuple_(literal(after.created_at), literal(after.id))
        wanted.append(place > last if ascending else place < last)
    order = (c.created_at, c.id) if ascending else (c.created_at.desc(), c.id.desc())
    return [File(**row._mapping) for row in connection.execute(select(FILES).where(*wanted).order_by(*order).limit(limit))]


def remove(connection: Connection, file: File) -> bool:
    """Whether nobody else of the namespace has its bytes: then they can go, too."""
    connection.execute(delete(FILES).where(FILES.c.id == file.id, FILES.c.namespace == file.namespace))
    same = select(func.count()).select_from(FILES).where(FILES.c.namespace == file.namespace, FILES.c.digest == file.digest)
    return connection.scalar(same) == 0

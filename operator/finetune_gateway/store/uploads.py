"""Files of the fine-tuning API that come in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select, update

from . import files
from .tables import PARTS, UPLOADS

PENDING, COMPLETED, CANCELLED = "pending", "completed", "cancelled"


@dataclass(frozen=True)
class Upload:
    """A row."""

    id: str
    namespace: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    status: str
    file: str


def add(connection: Connection, upload: Upload) -> None:
    """A new one."""
    connection.execute(insert(UPLOADS).values(**asdict(upload)))


def find(connection: Connection, namespace: str, identifier: str) -> Upload | None:
    """None for what is not there, or is another namespace's."""
    row = connection.execute(select(UPLOADS).where(UPLOADS.c.id == identifier, UPLOADS.c.namespace == namespace)).first()
    return Upload(**row._mapping) if row is not None else None


def stale(connection: Connection, namespace: str, before: int) -> Sequence[Upload]:
    """Those that were begun before that time, and have not ended."""
    c = UPLOADS.c
    found = connection.execute(select(UPLOADS).where(c.namespace == namespace, c.created_at < before, c.status == PENDING))
    return [Upload(**row._mapping) for row in found]


def add_part(connection: Connection, upload: Upload, part: str, size: int) -> None:
    """One that has come."""
    connection.execute(insert(PARTS).values(id=part, upload=upload.id, bytes=size))


def parts(connection: Connection, upload: Upload) -> dict[str, int]:
    """Bytes of each, by its id."""
    found = connection.execute(select(PARTS.c.id, PARTS.c.bytes).where(PARTS.c.upload == upload.id))
    return {row.id: row.bytes for row in found}


def end(connection: Connection, upload: Upload, status: str, file: files.File | None = None) -> bool:
    """Whether it had not ended before: then it has now, with this file; its parts are forgotten."""
    c = UPLOADS.c
    values = {"status": status, "file": file.id if file is not None else ""}
    if connection.execute(update(UPLOADS).where(c.id == upload.id, c.status == PENDING).values(**values)).rowcount == 0:
        return False
    if file is not None:
        files.add(connection, file)
    connection.execute(delete(PARTS).where(PARTS.c.upload == upload.id))
    return True

"""The tables, as the newest migration leaves them; a test holds the two against each other."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Date, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData(naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"})
NAME = String(253)
USAGE = Table(
    "finetune_usage",
    METADATA,
    Column("day", Date, primary_key=True),
    Column("namespace", NAME, primary_key=True),
    Column("model", NAME, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("key", NAME, primary_key=True),
    Column("user", NAME, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
"""version is 0 for a base; of key and user one is empty. Days in UTC."""
WRITERS = Table(
    "finetune_writers",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("last", BigInteger, nullable=False),
    Column("seen", Date, nullable=False, index=True),
)
"""Each process that writes, with the number of its last batch: one that comes again is not added again."""
COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens")
FILES = Table(
    "finetune_files",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("namespace", NAME, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("form", String(32), nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("problem", Text, nullable=False),
    Index("ix_finetune_files_namespace", "namespace", "created_at"),
)
"""Files of the fine-tuning API. Their bytes are in its bucket, by namespace and digest; `problem` is empty where nothing is wrong."""
UPLOADS = Table(
    "finetune_uploads",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("namespace", NAME, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("file", String(64), nullable=False),
    Index("ix_finetune_uploads_namespace", "namespace", "created_at"),
)
"""Files that come in parts; `file` is empty until it is whole."""
PARTS = Table(
    "finetune_parts",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("upload", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
)
"""Parts that have come."""
EVENTS = Table(
    "finetune_events",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("job", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("level", String(16), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("step", BigInteger, nullable=True),
    Index("ix_finetune_events_job", "job", "created_at"),
)
"""History of jobs, by their UID. The same event has the same id, whichever gateway saw it."""

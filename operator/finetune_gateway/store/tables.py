"""The tables, as the newest migration leaves them; a test holds the two against each other."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Date, Integer, MetaData, String, Table

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

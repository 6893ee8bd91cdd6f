"""The database: connections that give up in time, and its migrations. Blocks: for threads.

Knows no table but that of the migrations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

VERSION_TABLE = "finetune_schema"
REVISION = "0002"
"""The newest migration: their numbers are in order as text, too."""
_MIGRATIONS = Path(__file__).with_name("migrations")
_CONNECT_SECONDS = 5
_STATEMENT_SECONDS, _MIGRATION_SECONDS = 10, 600
_LOCK = 0x66696E6574756E65
"""Of PostgreSQL's advisory locks, the one that a migration holds: gateways may start at once."""


def engine_of(url: str) -> Engine:
    """sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME. Raises ValueError, which does not tell the URL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError("the database's URL cannot be read: are characters of the password written as %XX?") from None
    common: dict[str, Any] = {"hide_parameters": True, "pool_size": 3, "max_overflow": 0, "pool_timeout": _CONNECT_SECONDS}
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": _CONNECT_SECONDS}, **common)
        event.listen(engine, "connect", _own_transactions)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    wanted = {
        "application_name": "finetune-gateway",
        "connect_timeout": _CONNECT_SECONDS,
        "tcp_user_timeout": (_STATEMENT_SECONDS + _CONNECT_SECONDS) * 1000,  # of a server that vanished
        "prepare_threshold": None,  # PgBouncer keeps no prepared statements for us
    }
    arguments = {name: value for name, value in wanted.items() if name not in parsed.query}
    named = parsed.set(drivername="postgresql+psycopg")
    engine = create_engine(named, connect_args=arguments, pool_pre_ping=True, pool_recycle=1800, **common)
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _own_transactions(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # Python's would commit before DDL
    connection.execute("PRAGMA temp_store = MEMORY")  # the root is read-only


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_STATEMENT_SECONDS}s'")


def migrate(engine: Engine) -> str | None:
    """Bring it to this release's tables, one gateway at a time, all or nothing.

    The revision where it is a later release's: that was here, and its migrations have only added.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_MIGRATION_SECONDS}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        present = ""
        if inspect(connection).has_table(VERSION_TABLE):
            present = str(connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() or "")  # noqa: S608
        if present < REVISION:
            _upgrade(connection)
    return present if present > REVISION else None


def _upgrade(connection: Connection) -> None:
    from alembic import command  # 8 MB, for once
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    command.upgrade(config, "head")

"""Run by alembic: with the connection that `database.migrate` gives it, within its transaction."""

from __future__ import annotations

from alembic import context

from finetune_gateway.store.tables import METADATA

# SQLite's DDL is transactional where BEGIN is said, as `database` does
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

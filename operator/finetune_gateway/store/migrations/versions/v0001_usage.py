"""Use of models by key, model and day.

Migrations only add: tables, columns with a default, indexes. Gateways of the release before go on writing beside those of the
next while a rollout lasts, and after it was rolled back.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From an empty database."""
    name = sa.String(253)
    op.create_table(
        "finetune_usage",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("namespace", name, nullable=False),
        sa.Column("model", name, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("key", name, nullable=False),
        sa.Column("user", name, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "namespace", "model", "version", "key", "user", name="pk_finetune_usage"),
    )
    op.create_table(
        "finetune_writers",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("seen", sa.Date(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_finetune_writers"),
    )
    op.create_index("ix_finetune_writers_seen", "finetune_writers", ["seen"])

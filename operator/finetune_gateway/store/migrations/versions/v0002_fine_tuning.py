"""Files of the fine-tuning API, and the history of jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Only adds."""
    op.create_table(
        "finetune_files",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("namespace", sa.String(253), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("form", sa.String(32), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_finetune_files"),
    )
    op.create_index("ix_finetune_files_namespace", "finetune_files", ["namespace", "created_at"])
    op.create_table(
        "finetune_uploads",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("namespace", sa.String(253), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("file", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_finetune_uploads"),
    )
    op.create_index("ix_finetune_uploads_namespace", "finetune_uploads", ["namespace", "created_at"])
    op.create_table(
        "finetune_parts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("upload", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_finetune_parts"),
    )
    op.create_index("ix_finetune_parts_upload", "finetune_parts", ["upload"])
    op.create_table(
        "finetune_events",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("job", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_finetune_events"),
    )
    op.create_index("ix_finetune_events_job", "finetune_events", ["job", "created_at"])

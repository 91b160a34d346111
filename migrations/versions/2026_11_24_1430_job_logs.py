"""What trainers write, kept with the job.

Revision: 4c81f2d6a90e
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "4c81f2d6a90e"
down_revision = "2b9e64d07c1f"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("end_byte", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_logs_job_id_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "end_byte", name="pk_job_logs"),
    )


def downgrade() -> None:
    op.drop_table("job_logs")

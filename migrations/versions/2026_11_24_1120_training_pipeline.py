"""Several data sets, going on from an adapter, quarantine and exports.

Revision: 2b9e64d07c1f
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2b9e64d07c1f"
down_revision = "7d3f0b5c8e21"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_sources",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("reference", sa.String(length=256), nullable=False),
        sa.Column("split", sa.String(length=64), nullable=True),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("dataset_id", sa.String(length=40), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_sources_job_id_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "position", name="pk_job_sources"),
    )
    op.create_index("ix_job_sources_dataset_id", "job_sources", ["dataset_id"])
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("continue_digest", sa.String(length=64), nullable=True))
    op.create_index(
        "ix_jobs_continue_digest",
        "jobs",
        ["continue_digest"],
        postgresql_where=sa.text("continue_digest IS NOT NULL"),
        sqlite_where=sa.text("continue_digest IS NOT NULL"),
    )
    with op.batch_alter_table("job_metrics") as table:
        table.add_column(sa.Column("accuracy", sa.Double(), nullable=True))
        table.add_column(sa.Column("eval_accuracy", sa.Double(), nullable=True))
        table.add_column(sa.Column("margin", sa.Double(), nullable=True))
        table.add_column(sa.Column("eval_margin", sa.Double(), nullable=True))
        table.add_column(sa.Column("memory_bytes", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("adapter_aliases") as table:
        table.add_column(
            sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    with op.batch_alter_table("adapter_aliases") as table:
        table.alter_column("pinned", server_default=None)
    with op.batch_alter_table("adapter_versions") as table:
        # Why it is kept from aliases; null where it is not.
        table.add_column(sa.Column("quarantine", sa.String(length=255), nullable=True))
    op.create_table(
        "exports",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("version_id", sa.String(length=40), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("dtype", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(length=128), nullable=True),
        sa.Column("lease_expires_epoch", sa.Double(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_exports_project_id_projects"
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["adapter_versions.id"],
            name="fk_exports_version_id_adapter_versions",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_exports"),
    )
    op.create_index("ix_exports_version_id_id", "exports", ["version_id", "id"])
    op.create_index("ix_exports_status_id", "exports", ["status", "id"])
    op.create_index("ix_exports_project_id", "exports", ["project_id"])
    op.create_index("ix_exports_sha256", "exports", ["sha256"])
    op.create_index("ix_exports_finished_at", "exports", ["finished_at"])


def downgrade() -> None:
    op.drop_table("exports")
    # The older schema would serve what is quarantined; nothing points at it, so it stays unserved.
    with op.batch_alter_table("adapter_versions") as table:
        table.drop_column("quarantine")
    with op.batch_alter_table("adapter_aliases") as table:
        table.drop_column("pinned")
    with op.batch_alter_table("job_metrics") as table:
        table.drop_column("memory_bytes")
        table.drop_column("eval_margin")
        table.drop_column("margin")
        table.drop_column("eval_accuracy")
        table.drop_column("accuracy")
    op.drop_index("ix_jobs_continue_digest", "jobs")
    with op.batch_alter_table("jobs") as table:
        table.drop_column("continue_digest")
    op.drop_index("ix_job_sources_dataset_id", "job_sources")
    op.drop_table("job_sources")

"""Pausing, checkpoints, quotas, usage totals and webhooks.

Revision: 7d3f0b5c8e21
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "7d3f0b5c8e21"
down_revision = "41ce9c9ad68a"
branch_labels = None
depends_on = None

_TERMINAL = "('succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    with op.batch_alter_table("projects") as table:
        table.add_column(sa.Column("max_queued_jobs", sa.Integer(), nullable=True))
        table.add_column(sa.Column("max_running_jobs", sa.Integer(), nullable=True))
        table.add_column(sa.Column("max_stored_rows", sa.BigInteger(), nullable=True))
        table.add_column(sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True))
        table.add_column(
            sa.Column("last_claim_epoch", sa.Double(), nullable=False, server_default="0")
        )
        table.add_column(
            sa.Column("last_validation_epoch", sa.Double(), nullable=False, server_default="0")
        )
    with op.batch_alter_table("projects") as table:
        table.alter_column("last_claim_epoch", server_default=None)
        table.alter_column("last_validation_epoch", server_default=None)

    _upgrade_jobs()
    with op.batch_alter_table("workers") as table:
        table.drop_column("note")
        table.add_column(sa.Column("device", sa.String(length=16), nullable=True))
        table.add_column(
            sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0")
        )
        table.add_column(sa.Column("warm_base", sa.String(length=128), nullable=True))
        table.add_column(
            sa.Column("absent_base_models", sa.JSON(), nullable=False, server_default="[]")
        )
    with op.batch_alter_table("workers") as table:
        table.alter_column("memory_bytes", server_default=None)
        table.alter_column("absent_base_models", server_default=None)

    op.create_table(
        "job_checkpoints",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("invalid_reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_checkpoints_job_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "step", "attempt", name="pk_job_checkpoints"),
    )
    op.create_index("ix_job_checkpoints_sha256", "job_checkpoints", ["sha256"])
    op.create_table(
        "usage_totals",
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("used_seconds", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_usage_totals_project_id"),
        sa.PrimaryKeyConstraint("project_id", "status", name="pk_usage_totals"),
    )
    op.execute(
        "INSERT INTO usage_totals (project_id, status, jobs, trained_tokens, used_seconds) "
        "SELECT project_id, status, count(*), sum(trained_tokens), 0 FROM jobs "
        f"WHERE status IN {_TERMINAL} GROUP BY project_id, status"
    )
    _create_webhooks()


def _upgrade_jobs() -> None:
    op.drop_index("ix_jobs_status_priority_id", table_name="jobs")
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("queue_rank", sa.Integer(), nullable=False, server_default="0"))
        table.add_column(sa.Column("stop_requested", sa.String(length=16), nullable=True))
        table.add_column(
            sa.Column("validated", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        table.add_column(
            sa.Column("dry_run", sa.Boolean(), nullable=False, server_default=sa.false())
        )
        table.add_column(
            sa.Column("required_device", sa.String(length=16), nullable=False, server_default="any")
        )
        table.add_column(
            sa.Column("required_memory_bytes", sa.BigInteger(), nullable=False, server_default="0")
        )
        table.add_column(
            sa.Column(
                "required_cuda_memory_bytes", sa.BigInteger(), nullable=False, server_default="0"
            )
        )
        table.add_column(sa.Column("memory_rung", sa.Integer(), nullable=False, server_default="0"))
        table.add_column(sa.Column("attempt_started_epoch", sa.Double(), nullable=True))
        table.add_column(sa.Column("used_seconds", sa.Double(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET queue_rank = -priority")
    op.execute("UPDATE jobs SET stop_requested = 'cancel' WHERE cancel_requested")
    op.execute(
        "UPDATE jobs SET validated = (1 = 1) WHERE status IN ('queued', 'running', 'succeeded')"
    )
    with op.batch_alter_table("jobs") as table:
        table.drop_column("cancel_requested")
        for name in (
            "queue_rank",
            "validated",
            "dry_run",
            "required_device",
            "required_memory_bytes",
            "required_cuda_memory_bytes",
            "memory_rung",
            "used_seconds",
        ):
            table.alter_column(name, server_default=None)
    op.create_index("ix_jobs_status_queue_rank_id", "jobs", ["status", "queue_rank", "id"])
    op.create_index(
        "ix_jobs_project_id_status_queue_rank_id",
        "jobs",
        ["project_id", "status", "queue_rank", "id"],
    )
    op.create_index(
        "ix_jobs_project_id_adapter_name_id", "jobs", ["project_id", "adapter_name", "id"]
    )
    op.create_index("ix_jobs_project_id_base_model_id", "jobs", ["project_id", "base_model", "id"])
    op.drop_index("ix_jobs_status_lease_expires_epoch", table_name="jobs")
    op.create_index(
        "ix_jobs_worker_id",
        "jobs",
        ["worker_id"],
        postgresql_where=sa.text("worker_id IS NOT NULL"),
        sqlite_where=sa.text("worker_id IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_finished_at",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_dry_run_finished_at",
        "jobs",
        ["finished_at"],
        postgresql_where=sa.text("dry_run IS true"),
        sqlite_where=sa.text("dry_run IS 1"),
    )
    for name in ("job_id", "created_at"):
        op.create_index(f"ix_idempotency_keys_{name}", "idempotency_keys", [name])


def _create_webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("secret", sa.String(length=128), nullable=False),
        sa.Column("previous_secret", sa.String(length=128), nullable=True),
        sa.Column("previous_secret_until_epoch", sa.Double(), nullable=True),
        sa.Column("events", sa.JSON(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_webhooks_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
    )
    op.create_index("ix_webhooks_project_id_id", "webhooks", ["project_id", "id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_epoch", sa.Double(), nullable=False),
        sa.Column("response_status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_webhook_deliveries_project_id"
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"],
            ["webhooks.id"],
            name="fk_webhook_deliveries_webhook_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
    )
    op.create_index(
        "ix_webhook_deliveries_status_next_attempt_epoch",
        "webhook_deliveries",
        ["status", "next_attempt_epoch"],
    )
    op.create_index(
        "ix_webhook_deliveries_webhook_id_id", "webhook_deliveries", ["webhook_id", "id"]
    )


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
    op.drop_table("usage_totals")
    op.drop_table("job_checkpoints")
    with op.batch_alter_table("workers") as table:
        table.drop_column("absent_base_models")
        table.drop_column("warm_base")
        table.drop_column("memory_bytes")
        table.drop_column("device")
        table.add_column(sa.Column("note", sa.Text(), nullable=True))

    for name in ("job_id", "created_at"):
        op.drop_index(f"ix_idempotency_keys_{name}", table_name="idempotency_keys")
    # There are no dry runs in the older schema, where they would become jobs.
    op.execute("DELETE FROM job_events WHERE job_id IN (SELECT id FROM jobs WHERE dry_run)")
    op.execute("DELETE FROM jobs WHERE dry_run")
    op.drop_index("ix_jobs_dry_run_finished_at", table_name="jobs")
    op.drop_index("ix_jobs_finished_at", table_name="jobs")
    op.drop_index("ix_jobs_worker_id", table_name="jobs")
    op.create_index("ix_jobs_status_lease_expires_epoch", "jobs", ["status", "lease_expires_epoch"])
    op.drop_index("ix_jobs_project_id_base_model_id", table_name="jobs")
    op.drop_index("ix_jobs_project_id_adapter_name_id", table_name="jobs")
    op.drop_index("ix_jobs_project_id_status_queue_rank_id", table_name="jobs")
    op.drop_index("ix_jobs_status_queue_rank_id", table_name="jobs")
    with op.batch_alter_table("jobs") as table:
        table.add_column(
            sa.Column("cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    op.execute("UPDATE jobs SET cancel_requested = (1 = 1) WHERE stop_requested = 'cancel'")
    # There is no pause in the older schema: such a job waits again.
    op.execute("UPDATE jobs SET status = 'queued' WHERE status = 'paused' AND validated")
    op.execute("UPDATE jobs SET status = 'validating' WHERE status = 'paused'")
    with op.batch_alter_table("jobs") as table:
        table.alter_column("cancel_requested", server_default=None)
        for name in (
            "used_seconds",
            "attempt_started_epoch",
            "memory_rung",
            "required_cuda_memory_bytes",
            "required_memory_bytes",
            "required_device",
            "dry_run",
            "validated",
            "stop_requested",
            "queue_rank",
        ):
            table.drop_column(name)
    op.create_index("ix_jobs_status_priority_id", "jobs", ["status", "priority", "id"])
    with op.batch_alter_table("projects") as table:
        for name in (
            "last_validation_epoch",
            "last_claim_epoch",
            "max_stored_bytes",
            "max_stored_rows",
            "max_running_jobs",
            "max_queued_jobs",
        ):
            table.drop_column(name)

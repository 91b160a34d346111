"""The tables. Every owned row carries `project_id`; nothing is loaded lazily."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from core.db.types import UtcDateTime


def utc_now() -> datetime:
    """Return the present instant, timezone-aware."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Declarative base with stable constraint names, which migrations rely on."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        dict[str, Any]: JSON,
        list[str]: JSON,
        datetime: UtcDateTime,
    }


class Project(Base):
    """A tenant."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    # Quotas; `None` is the service's default, 0 is no limit.
    max_queued_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_stored_rows: Mapped[int | None] = mapped_column(BigInteger)
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    # When a worker last began to train one of its jobs, and to validate one; by the database's
    # clock.
    last_claim_epoch: Mapped[float] = mapped_column(default=0.0)
    last_validation_epoch: Mapped[float] = mapped_column(default=0.0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class ApiKey(Base):
    """A hashed API key; the key itself is shown once and never stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    revoked_at: Mapped[datetime | None]


class BaseModel(Base):
    """A base model that the operator allows; shared by all projects."""

    __tablename__ = "base_models"
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    source: Mapped[str] = mapped_column(String(1024))
    path: Mapped[str] = mapped_column(String(4096))
    digest: Mapped[str] = mapped_column(String(64), index=True)
    # Architecture, parameter count, module shapes, template and tokenizer hashes, golden tokens.
    description: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Dataset(Base):
    """An uploaded data set; its bytes are a blob in the artifact store."""

    __tablename__ = "datasets"
    __table_args__ = (Index("ix_datasets_project_id_id", "project_id", "id"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(32))
    rows: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Job(Base):
    """A fine-tuning job and, while it runs, the lease of the worker that runs it."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_id_id", "project_id", "id"),
        Index("ix_jobs_project_id_status_id", "project_id", "status", "id"),
        # What the queue position counts: waiting jobs, best first.
        Index("ix_jobs_status_queue_rank_id", "status", "queue_rank", "id"),
        # What the claim looks up: the best waiting job of each project.
        Index(
            "ix_jobs_project_id_status_queue_rank_id", "project_id", "status", "queue_rank", "id"
        ),
        Index("ix_jobs_project_id_adapter_name_id", "project_id", "adapter_name", "id"),
        Index("ix_jobs_project_id_base_model_id", "project_id", "base_model", "id"),
        # The jobs that workers hold, for the sweep. It does not hold the lease's end: an index on
        # what every heartbeat changes would have each of them rewrite all indexes of the row.
        Index(
            "ix_jobs_worker_id",
            "worker_id",
            postgresql_where=text("worker_id IS NOT NULL"),
            sqlite_where=text("worker_id IS NOT NULL"),
        ),
        # Whether a job goes on from an adapter that is to be deleted.
        Index(
            "ix_jobs_continue_digest",
            "continue_digest",
            postgresql_where=text("continue_digest IS NOT NULL"),
            sqlite_where=text("continue_digest IS NOT NULL"),
        ),
        # Which ended jobs are past their time.
        Index(
            "ix_jobs_finished_at",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
            sqlite_where=text("finished_at IS NOT NULL"),
        ),
        # Dry runs, which are few: those that go on, whose end is null, and those past their time.
        Index(
            "ix_jobs_dry_run_finished_at",
            "finished_at",
            postgresql_where=text("dry_run IS true"),
            sqlite_where=text("dry_run IS 1"),
        ),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    # No foreign key: a finished job outlives its data set.
    dataset_id: Mapped[str] = mapped_column(String(40), index=True)
    base_model: Mapped[str] = mapped_column(String(128))
    adapter_name: Mapped[str] = mapped_column(String(63))
    # Artifact whose weights training begins with.
    continue_digest: Mapped[str | None] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0)
    # The negative priority: an index in one direction then has the best job first.
    queue_rank: Mapped[int] = mapped_column(default=0)

    # See `core.job_status`.
    status: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(default=0)
    # Attempts that ended because their worker vanished; the attempt limit counts these.
    lost_attempts: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(128))
    lease_expires_epoch: Mapped[float | None]
    # What the owner wants of the worker that holds the job: "cancel" or "pause".
    stop_requested: Mapped[str | None] = mapped_column(String(16))
    # Once true, a job that waits again waits for training.
    validated: Mapped[bool] = mapped_column(Boolean, default=False)
    # It ends with the report of its validation; see `core.jobs.dry_runs`. Its `dataset_id` is empty
    # and its spec holds the rows when they came inline.
    dry_run: Mapped[bool] = mapped_column(Boolean, default=False)

    # What a worker must have to train it; on CUDA the same job may need less.
    required_device: Mapped[str] = mapped_column(String(16), default="any")
    required_memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    required_cuda_memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    # How far the next attempt goes down the memory ladder.
    memory_rung: Mapped[int] = mapped_column(default=0)
    # By the database's clock; earlier attempts are summed in `used_seconds`.
    attempt_started_epoch: Mapped[float | None]
    used_seconds: Mapped[float] = mapped_column(default=0.0)

    stage: Mapped[str | None] = mapped_column(String(32))
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    eta_seconds: Mapped[float | None]
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    last_event: Mapped[int] = mapped_column(default=0)

    error: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]
    version_id: Mapped[str | None] = mapped_column(String(40))

    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobSource(Base):
    """One data set of a job that uses several, or its validation rows.

    A reference to a Hugging Face data set gets its `dataset_id` when a worker has fetched it.
    """

    __tablename__ = "job_sources"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    # "training" or "validation".
    role: Mapped[str] = mapped_column(String(16))
    reference: Mapped[str] = mapped_column(String(256))
    split: Mapped[str | None] = mapped_column(String(64))
    weight: Mapped[float] = mapped_column(default=1.0)
    dataset_id: Mapped[str | None] = mapped_column(String(40), index=True)


class IdempotencyKey(Base):
    """Which job a client's Idempotency-Key created, and from which body."""

    __tablename__ = "idempotency_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now, index=True)


class JobEvent(Base):
    """One entry of a job's history; `sequence` counts from 1 without gaps per job."""

    __tablename__ = "job_events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class JobMetric(Base):
    """Measurements of one logging step of one attempt."""

    __tablename__ = "job_metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[float | None]
    loss: Mapped[float | None]
    eval_loss: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    # Share of the trained tokens that the model would have written itself, or of the pairs whose
    # chosen answer it prefers more than its reference does.
    accuracy: Mapped[float | None]
    eval_accuracy: Mapped[float | None]
    # By how much it does, of preference pairs.
    margin: Mapped[float | None]
    eval_margin: Mapped[float | None]
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class JobLog(Base):
    """Some whole lines of what an attempt's child wrote, the newest of which are kept.

    A job's log is one text over all attempts, addressed by its bytes.
    """

    __tablename__ = "job_logs"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    # Where these lines end; they begin as many bytes before it as they are long.
    end_byte: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    text: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class JobCheckpoint(Base):
    """A training state that a later attempt can go on from; its bytes are a blob, a tar archive."""

    __tablename__ = "job_checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    # Why it cannot be used, once an attempt found that out.
    invalid_reason: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class UsageTotal(Base):
    """What a project's ended jobs add up to; see `core.db.repositories.usage` for what counts."""

    __tablename__ = "usage_totals"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    # The status that the jobs ended in.
    status: Mapped[str] = mapped_column(String(16), primary_key=True)
    # How often a job ended so; a job that is tried again ends more than once.
    jobs: Mapped[int] = mapped_column(BigInteger, default=0)
    trained_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    used_seconds: Mapped[float] = mapped_column(default=0.0)


class Webhook(Base):
    """An address that is told what happens in a project."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_project_id_id", "project_id", "id"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    url: Mapped[str] = mapped_column(String(2048))
    # Needed in clear to sign with; shown once.
    secret: Mapped[str] = mapped_column(String(128))
    # The one before the last rotation signs besides, until this moment of the database's clock.
    previous_secret: Mapped[str | None] = mapped_column(String(128))
    previous_secret_until_epoch: Mapped[float | None]
    events: Mapped[list[str]]
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class WebhookDelivery(Base):
    """One message for one webhook, written in the transaction that it tells of (an outbox)."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_status_next_attempt_epoch", "status", "next_attempt_epoch"),
        Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    event: Mapped[str] = mapped_column(String(32))
    payload: Mapped[dict[str, Any]]
    # pending → delivered | dead; a replay makes it pending again.
    status: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    # By the database's clock; while a worker sends it, when another may try.
    next_attempt_epoch: Mapped[float] = mapped_column(default=0.0)
    response_status: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    delivered_at: Mapped[datetime | None]


class Adapter(Base):
    """A name under which versions are published."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(63))
    # Never decreases, so that the number of a deleted version is not given again.
    last_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class AdapterVersion(Base):
    """One immutable build of an adapter."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        # Publishing is idempotent: one job, one version.
        UniqueConstraint("job_id"),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"))
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    base_model: Mapped[str] = mapped_column(String(128))
    base_digest: Mapped[str] = mapped_column(String(64))
    origin: Mapped[str] = mapped_column(String(16))  # "job" or "import"
    job_id: Mapped[str | None] = mapped_column(String(40))
    manifest: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    # Why no alias may point at it; null where one may.
    quarantine: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class AdapterAlias(Base):
    """A movable name of a version; `latest` is what a bare adapter name means."""

    __tablename__ = "adapter_aliases"
    adapter_id: Mapped[str] = mapped_column(
        ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True
    )
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"), index=True)
    # Whether engines shall have what it points at in memory at all times.
    pinned: Mapped[bool] = mapped_column(default=False)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class Export(Base):
    """A file made of an adapter version, and the lease of the worker that makes it."""

    __tablename__ = "exports"
    __table_args__ = (
        Index("ix_exports_version_id_id", "version_id", "id"),
        # What a worker takes next, and what workers hold.
        Index("ix_exports_status_id", "status", "id"),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"))
    format: Mapped[str] = mapped_column(String(16))
    dtype: Mapped[str] = mapped_column(String(16))
    # queued → running → succeeded | failed
    status: Mapped[str] = mapped_column(String(16), default="queued")
    attempt: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(128))
    lease_expires_epoch: Mapped[float | None]
    # Of the file, a blob.
    sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[datetime | None] = mapped_column(index=True)


class Worker(Base):
    """A worker process that reported itself; `heartbeat_epoch` is by the database's clock."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    queue: Mapped[str] = mapped_column(String(16))
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    job_id: Mapped[str | None] = mapped_column(String(40))
    heartbeat_epoch: Mapped[float]
    device: Mapped[str | None] = mapped_column(String(16))
    memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    # Name of the base model that its child has in memory.
    warm_base: Mapped[str | None] = mapped_column(String(128))
    # Names of the base models whose files its machine lacks.
    absent_base_models: Mapped[list[str]] = mapped_column(default=list)


class Lease(Base):
    """A named duty that one process at a time performs, such as the sweep."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(128))
    expires_epoch: Mapped[float]

"""What goes when, and that looking for it costs little however much there is."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from core import jobs
from core.config import Settings
from core.db.models import (
    Base,
    IdempotencyKey,
    Job,
    JobCheckpoint,
    JobEvent,
    JobLog,
    JobMetric,
    Webhook,
    WebhookDelivery,
    utc_now,
)
from core.db.session import Database
from core.db.types import database_epoch
from core.housekeeping import clean, retention, tidy
from core.principal import LOCAL
from core.storage import LocalStore
from tests.support import many_jobs
from tests.support.command_line import succeed, tunesmith
from tests.support.factories import add_base_model, add_dataset, queue_job
from tests.support.query_plans import explained

KEEP_CHECKPOINTS, KEEP_JOBS, KEEP_OTHERS = 100.0, 1000.0, 500.0
TEN_YEARS = 3.2e8


@pytest.fixture
def keeping(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "keep_checkpoints_seconds": KEEP_CHECKPOINTS,
            "keep_jobs_seconds": KEEP_JOBS,
            "keep_deliveries_seconds": KEEP_OTHERS,
            "keep_idempotency_seconds": KEEP_OTHERS,
        }
    )


def add_job(
    database: Database,
    store: LocalStore,
    job_id: str,
    status: str,
    ended_seconds_ago: float | None = None,
    *,
    events: int = 2,
) -> str:
    """Insert a job with history and one checkpoint; return the checkpoint's hash."""
    blob = store.write_blob([job_id.encode()], 100)
    ended = None if ended_seconds_ago is None else utc_now() - timedelta(seconds=ended_seconds_ago)
    held = status == "running"
    with database.session(write=True) as session:
        session.add(
            Job(
                id=job_id,
                project_id=LOCAL.project_id,
                dataset_id="file-none",
                base_model="tiny",
                adapter_name="bot",
                spec={},
                status=status,
                attempt=1,
                last_event=events,
                finished_at=ended,
                worker_id="w" if held else None,
                lease_expires_epoch=4e9 if held else None,
            )
        )
        session.flush()
        session.add_all(
            JobEvent(job_id=job_id, sequence=n + 1, attempt=1, type="log", data={})
            for n in range(events)
        )
        session.add_all(JobMetric(job_id=job_id, attempt=1, step=n) for n in range(events))
        session.add_all(
            JobLog(job_id=job_id, end_byte=2 * n + 2, attempt=1, text="a\n") for n in range(events)
        )
        session.add(
            JobCheckpoint(job_id=job_id, step=1, attempt=1, sha256=blob.sha256, bytes=blob.bytes)
        )
    return blob.sha256


def test_checkpoints_go_as_their_jobs_end(
    database: Database, store: LocalStore, keeping: Settings
) -> None:
    gone = [
        add_job(database, store, "job-1", "succeeded", 0),
        add_job(database, store, "job-2", "failed", KEEP_CHECKPOINTS + 5),
        add_job(database, store, "job-3", "cancelled", KEEP_CHECKPOINTS + 5),
    ]
    kept = [
        add_job(database, store, "job-4", "failed", KEEP_CHECKPOINTS - 50),
        add_job(database, store, "job-5", "cancelled", KEEP_CHECKPOINTS - 50),
        add_job(database, store, "job-6", "paused"),
        add_job(database, store, "job-7", "running"),
        add_job(database, store, "job-8", "queued"),
    ]
    foreseen = clean(database, store, keeping, dry_run=True)
    assert all(map(store.has_blob, gone))
    report = clean(database, store, keeping)
    assert report.removed["checkpoints"] == foreseen.removed["checkpoints"]
    assert (report.removed["checkpoints"].count, report.removed["checkpoints"].bytes) == (3, 15)
    assert not any(map(store.has_blob, gone))
    assert all(map(store.has_blob, kept))
    with database.session() as session:
        assert set(session.scalars(select(JobCheckpoint.sha256))) == set(kept)
        assert session.scalar(select(func.count()).select_from(Job)) == 8


def test_bytes_that_a_data_set_shares_with_a_checkpoint_stay(
    database: Database, store: LocalStore, keeping: Settings
) -> None:
    sha256 = add_job(database, store, "job-1", "succeeded", 0)
    assert add_dataset(database, store, content=b"job-1").sha256 == sha256
    assert clean(database, store, keeping).removed["checkpoints"].count == 1
    assert store.has_blob(sha256)


def test_ended_jobs_go_with_all_they_have(
    database: Database, store: LocalStore, keeping: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than a batch of each, so that one job takes several transactions.
    monkeypatch.setattr(retention, "_ROWS", 7)
    monkeypatch.setattr(retention, "_JOBS", 2)
    for number, status in enumerate(["succeeded", "failed", "cancelled", "failed", "succeeded"]):
        add_job(database, store, f"job-{number}", status, KEEP_JOBS + 5 + number, events=5 * number)
    with database.session(write=True) as session:
        session.add(
            IdempotencyKey(project_id=LOCAL.project_id, key="k", body_sha256="b", job_id="job-0")
        )
    add_job(database, store, "job-kept", "succeeded", KEEP_JOBS - 50)
    add_job(database, store, "job-waits", "queued")
    foreseen = clean(database, store, keeping, dry_run=True)
    report = clean(database, store, keeping)
    assert report.removed["jobs"].count == foreseen.removed["jobs"].count == 5
    with database.session() as session:
        assert set(session.scalars(select(Job.id))) == {"job-kept", "job-waits"}
        for table in (JobEvent, JobMetric, JobLog):
            counts = session.execute(
                select(table.job_id, func.count()).group_by(table.job_id)
            ).all()
            assert sorted(tuple(row) for row in counts) == [("job-kept", 2), ("job-waits", 2)]
        assert session.scalars(select(IdempotencyKey)).all() == []


def test_jobs_are_kept_unless_told_otherwise(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_job(database, store, "job-1", "succeeded", TEN_YEARS)
    assert clean(database, store, settings).removed["jobs"].count == 0
    with database.session() as session:
        assert session.scalars(select(Job.id)).all() == ["job-1"]


def test_a_job_that_is_tried_again_keeps_its_checkpoints(
    database: Database, store: LocalStore, keeping: Settings
) -> None:
    sha256 = add_job(database, store, "job-1", "failed", KEEP_CHECKPOINTS + 5)
    with database.session(write=True) as session:
        session.execute(update(Job).values(status="queued", finished_at=None))
    clean(database, store, keeping)
    assert store.has_blob(sha256)


def test_deliveries_and_keys_go_when_their_time_is_over(
    database: Database, store: LocalStore, keeping: Settings
) -> None:
    add_base_model(database)
    for key in ("old", "young"):
        queue_job(database, store, keeping, key=key)
    with database.session(write=True) as session:
        session.add(
            Webhook(id="webhook-1", project_id=LOCAL.project_id, url="x", secret="s", events=[])
        )
        session.flush()
        session.add_all(
            WebhookDelivery(
                id=f"{status}-{age}",
                project_id=LOCAL.project_id,
                webhook_id="webhook-1",
                event="job.succeeded",
                payload={},
                status=status,
            )
            for status in ("pending", "delivered", "dead")
            for age in ("old", "young")
        )
        session.flush()
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.id.like("%-old"))
            .values(next_attempt_epoch=database_epoch() - KEEP_OTHERS - 5)
        )
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.id.like("%-young"))
            .values(next_attempt_epoch=database_epoch() - KEEP_OTHERS + 50)
        )
        session.execute(
            update(IdempotencyKey)
            .where(IdempotencyKey.key == "old")
            .values(created_at=utc_now() - timedelta(seconds=KEEP_OTHERS + 5))
        )
    foreseen = clean(database, store, keeping, dry_run=True)
    report = clean(database, store, keeping)
    for kind, count in (("deliveries", 2), ("idempotency_keys", 1)):
        assert report.removed[kind].count == foreseen.removed[kind].count == count, kind
    with database.session() as session:
        assert set(session.scalars(select(WebhookDelivery.id))) == {
            "pending-old", "pending-young", "delivered-young", "dead-young",
        }  # fmt: skip
        assert session.scalars(select(IdempotencyKey.key)).all() == ["young"]
        assert len(jobs.list_jobs(session, LOCAL).data) == 2


def test_looking_for_what_is_due_reads_no_growing_table_from_end_to_end(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    many_jobs.fill(database, 5000)
    forever = settings.model_copy(
        update={name: TEN_YEARS for name in Settings.model_fields if name.startswith("keep_")}
    )
    with database.session(write=True) as session:
        # The deliveries are from the first seconds of 1970.
        session.execute(update(WebhookDelivery).values(next_attempt_epoch=database_epoch()))
    many_jobs.refresh_statistics(database)
    with explained(database) as plans:
        report = tidy(database, store, forever, "first")
    assert report is not None
    assert not any(removed.count for removed in report.removed.values())
    # Checkpoints are few, for they go with time; theirs is the only table that is walked through.
    for plan in plans.all:
        assert plan.scanned <= {"job_checkpoints"}, f"{plan.statement}\n{plan.text}"


def test_removing_a_job_looks_up_what_belongs_to_it(database: Database) -> None:
    many_jobs.fill(database, 5000)
    with database.session() as session:
        oldest = session.scalars(select(func.min(Job.finished_at))).one()
    with explained(database) as plans:
        removed = retention._remove_jobs(database, oldest + timedelta(seconds=60))
    assert 0 < removed.rows <= 100
    for plan in plans.all:
        assert plan.scanned <= {"job_checkpoints"}, f"{plan.statement}\n{plan.text}"


def test_the_command_says_what_it_would_do_and_then_does_it(
    sqlite_database: Database, store: LocalStore, settings: Settings
) -> None:
    sha256 = add_job(sqlite_database, store, "job-1", "succeeded", 10)
    add_dataset(sqlite_database, store)
    store.write_blob([b"nobody's"], 100)
    at = ["--data-dir", settings.root]
    foreseen = succeed("gc", "--dry-run", "--grace", 0, "--json", *at).json
    assert foreseen["dry_run"] is True
    assert foreseen["removed"]["checkpoints"] == {"count": 1, "bytes": 5}
    assert foreseen["removed"]["blobs"] == {"count": 1, "bytes": 8}
    assert store.has_blob(sha256)
    shown = succeed("gc", "--grace", 0, *at)
    assert "checkpoints of ended jobs" in shown.stdout
    assert not store.has_blob(sha256)
    assert succeed("gc", "--grace", 0, *at).stdout == "Nothing to remove.\n"


def test_the_command_refuses_a_store_that_is_not_this_databases(
    sqlite_database: Database, store: LocalStore, settings: Settings
) -> None:
    store.write_blob([b"theirs"], 100)
    at = ["--grace", 0, "--data-dir", settings.root]
    refused = tunesmith("gc", *at)
    assert refused.code == 1
    assert "--force" in refused.stderr
    assert succeed("gc", "--force", "--json", *at).json["removed"]["blobs"]["count"] == 1


def test_every_table_is_one_that_housekeeping_knows_about() -> None:
    """A new table must be thought of: what removes its rows, and does a backup hold it?"""
    assert {table.name for table in Base.metadata.sorted_tables} == {
        "projects", "api_keys", "base_models", "datasets", "jobs", "idempotency_keys",
        "job_sources", "job_events", "job_metrics", "job_logs", "job_checkpoints", "usage_totals",
        "webhooks", "webhook_deliveries", "adapters", "adapter_versions", "adapter_aliases",
        "exports", "workers", "leases",
    }  # fmt: skip

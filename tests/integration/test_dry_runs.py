"""Dry runs between owner, database and worker: nothing else may notice them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from core import costs, jobs
from core.config import Settings
from core.db.models import (
    Adapter,
    AdapterVersion,
    Dataset,
    Job,
    JobEvent,
    UsageTotal,
    WebhookDelivery,
    Worker,
    utc_now,
)
from core.db.repositories import overview
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound, QuotaExceeded
from core.housekeeping import clean
from core.jobs import requirements
from core.principal import LOCAL, Principal
from core.reads import DryRunRead
from core.storage import LocalStore
from tests.support.factories import (
    add_base_model,
    add_dataset,
    add_project,
    describe_base,
    make_spec,
    must_claim,
    submit,
)
from tests.support.webhooks import subscribe

REPORT: dict[str, Any] = {
    "valid": True,
    "format": "messages",
    "sources": [],
    "rows_read": 4,
    "rows": 4,
    "dropped": {},
    "error_count": 0,
    "errors": [],
    "too_long": None,
    "duplicates": 0,
    "duplicate_rows": [],
    "training_rows": 4,
    "validation_rows": 0,
    "overlap": 0,
    "overlap_rows": [],
    "tokens": {"total": 100, "min": 10, "mean": 25.0, "p50": 20, "p95": 50, "max": 50},
    "trained_tokens": 60,
    "histogram": [],
    "steps": 3,
    "tokens_per_epoch": 100,
    "total_tokens": 300,
    "sample": None,
    "warnings": [],
}


def start(
    database: Database, settings: Settings, owner: Principal = LOCAL, **fields: Any
) -> DryRunRead:
    return jobs.start_dry_run(database, owner, make_spec(**fields), settings=settings)


def read(database: Database, dry_run_id: str, owner: Principal = LOCAL) -> DryRunRead:
    with database.session() as session:
        return jobs.get_dry_run(session, owner, dry_run_id)


def finish(database: Database, **report: Any) -> None:
    claim = must_claim(database, "light", "validate")
    assert claim.dry_run
    jobs.validation_done(database, claim, "light", REPORT | report)


def count(database: Database, table: type[Any]) -> int:
    with database.session() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_dry_run_ends_with_its_report_and_waits_for_no_training(
    database: Database, settings: Settings
) -> None:
    add_base_model(database)
    started = start(database, settings)
    assert (started.status, started.valid, started.report) == ("validating", None, None)
    finish(database)
    ended = read(database, started.id)
    assert (ended.status, ended.valid) == ("succeeded", True)
    assert ended.report is not None
    assert ended.report.model_dump(mode="json") == REPORT
    assert ended.finished_at is not None
    assert jobs.claim(database, worker_id="w", stage="train", lease_seconds=9) is None
    with database.session() as session:
        assert session.scalars(select(Job.spec)).one()["rows"] is None


def test_nothing_counts_lists_or_tells_of_a_dry_run(
    database: Database, settings: Settings, store: LocalStore
) -> None:
    add_base_model(database)
    one = settings.model_copy(update={"quota_queued_jobs": 1})
    subscribe(database, one, "https://example.com/hook", "job.succeeded", "job.failed")
    waiting, held = start(database, one), start(database, one)
    with database.session() as session:
        assert jobs.list_jobs(session, LOCAL).data == []
        assert overview.owned_jobs(session, LOCAL, [waiting.id]) == set()
        totals = overview.read_totals(session, worker_silence_seconds=9)
        assert totals.unfinished["validating"] == 0
        for look in (jobs.get, jobs.events, jobs.metrics, jobs.report):
            with pytest.raises(NotFound):
                look(session, LOCAL, held.id)
    for act in (jobs.cancel, jobs.pause, jobs.resume, jobs.delete):
        with database.session(write=True) as session, pytest.raises((NotFound, Conflict)) as caught:
            act(session, LOCAL, held.id)
        assert caught.value.code == "unknown_job"
    finish(database)
    claim = must_claim(database, "light", "validate")
    jobs.fail(database, claim, "light", {"code": "broken", "message": ""})
    assert count(database, UsageTotal) == count(database, WebhookDelivery) == 0
    # The quota of one waiting job is not used up.
    assert submit(database, store, one).status == "validating"
    assert count(database, Dataset) == 1


def test_a_dry_run_goes_before_jobs(
    database: Database, settings: Settings, store: LocalStore
) -> None:
    add_base_model(database)
    submit(database, store, settings, priority=100)
    started = start(database, settings)
    assert must_claim(database, "light", "validate").job_id == started.id


def test_an_impossible_spec_is_refused_as_a_job_is(database: Database, settings: Settings) -> None:
    add_base_model(database)
    stranger = add_project(database, "stranger")
    for code, fields in {
        "unknown_base_model": {"base_model": "other"},
        "unknown_dataset": {"dataset": "file-none"},
        "unknown_target_module": {"lora": {"target_modules": ["nothing"]}},
    }.items():
        with pytest.raises(InvalidInput) as caught:
            start(database, settings, stranger, **fields)
        assert caught.value.code == code
    assert count(database, Job) == 0


def test_another_project_cannot_read_it(database: Database, settings: Settings) -> None:
    add_base_model(database)
    started = start(database, settings)
    with pytest.raises(NotFound) as caught:
        read(database, started.id, add_project(database, "stranger"))
    assert caught.value.code == "unknown_validation"


def test_a_job_is_no_dry_run(database: Database, settings: Settings, store: LocalStore) -> None:
    add_base_model(database)
    job = submit(database, store, settings)
    with pytest.raises(NotFound):
        read(database, job.id)


def test_a_project_has_a_bounded_number_under_way(database: Database, settings: Settings) -> None:
    add_base_model(database)
    for _ in range(20):
        start(database, settings)
    with pytest.raises(QuotaExceeded):
        start(database, settings)
    start(database, settings, add_project(database, "other"))
    finish(database)
    finish(database)
    start(database, settings)


def test_a_lost_worker_costs_nothing_but_time(database: Database, settings: Settings) -> None:
    add_base_model(database)
    started = start(database, settings)
    must_claim(database, "dead", "validate", lease_seconds=-1)
    assert jobs.sweep(database, "s", 30, max_attempts=2) == 1
    assert read(database, started.id).status == "validating"
    must_claim(database, "dead", "validate", lease_seconds=-1)
    assert jobs.sweep(database, "s", 30, max_attempts=2) == 1
    ended = read(database, started.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "attempts_exhausted"


def test_it_is_removed_after_a_day(
    database: Database, settings: Settings, store: LocalStore
) -> None:
    add_base_model(database)
    old, new = start(database, settings), start(database, settings)
    finish(database)
    finish(database)
    with database.session(write=True) as session:
        day_ago = utc_now() - timedelta(days=1, seconds=5)
        session.execute(update(Job).where(Job.id == old.id).values(finished_at=day_ago))
    clean(database, store, settings)
    with pytest.raises(NotFound):
        read(database, old.id)
    assert read(database, new.id).valid
    with database.session() as session:
        assert set(session.scalars(select(JobEvent.job_id))) == {new.id}


def test_the_estimate_comes_from_what_was_measured(
    database: Database, settings: Settings, store: LocalStore
) -> None:
    add_base_model(database)
    dataset = add_dataset(database, store).id
    first = start(database, settings, dataset=dataset)
    finish(database)
    estimate = read(database, first.id).estimate
    assert estimate is not None
    assert (estimate.device, estimate.seconds, estimate.peak_memory_bytes) == (None, None, None)
    assert estimate.seconds_reason == "no train worker has told which device it has"

    with database.session(write=True) as session:
        session.add(
            Worker(
                id="w", queue="train", host="h", pid=1, heartbeat_epoch=4e9, device="cpu",
                absent_base_models=[],
            )
        )  # fmt: skip
    _add_trained_job(
        database,
        training_seconds=10.0,
        training_operations=5e6,
        other_seconds=6.0,
        evaluation_operations=1e6,
    )
    second = start(database, settings, dataset=dataset, training={"batch_size": 4})
    finish(database)
    estimate = read(database, second.id).estimate
    assert estimate is not None
    spec = make_spec(training={"batch_size": 4})
    shape = costs.shape_of(spec, describe_base())
    operations = costs.training_operations(
        # Three epochs of four rows, four in a pass.
        spec, shape, costs.Rows(4, 100, 60), tokens=300, passes=3
    )  # fmt: skip
    operations += costs.evaluation_operations(spec, shape, costs.Rows(0, 0, 0), 3)
    # At 500,000 a second; the other job's four seconds were neither training nor evaluation.
    assert estimate.seconds == pytest.approx(operations / 5e5 + 4, abs=0.1)
    assert (estimate.device, estimate.measured_jobs) == ("cpu", 1)
    assert estimate.peak_memory_bytes == requirements.peak_memory_bytes(
        spec, describe_base(), on_cuda=False, tokens=4 * 50, trained_share=0.6
    )

    third = start(database, settings, dataset=dataset, resources={"device": "cuda"})
    finish(database)
    estimate = read(database, third.id).estimate
    assert estimate is not None
    assert (estimate.device, estimate.seconds) == ("cuda", None)
    assert "'cuda'" in str(estimate.seconds_reason)


def _add_trained_job(database: Database, **pace: float) -> None:
    with database.session(write=True) as session:
        session.add(Adapter(id="adapter-1", project_id=LOCAL.project_id, name="bot"))
        session.add(
            Job(
                id="job-1", project_id=LOCAL.project_id, dataset_id="file-none", base_model="tiny",
                adapter_name="bot", spec={}, status="succeeded", version_id="version-1",
                finished_at=utc_now(),
            )
        )  # fmt: skip
        session.flush()
        session.add(
            AdapterVersion(
                id="version-1", project_id=LOCAL.project_id, adapter_id="adapter-1", version=1,
                digest="d" * 64, bytes=1, base_model="tiny", base_digest="b" * 64, origin="job",
                job_id="job-1", manifest={}, provenance={"device": "cpu:0", "pace": pace},
            )
        )  # fmt: skip

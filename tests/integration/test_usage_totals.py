from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import text, update

from core import jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.models import Job
from core.db.repositories import overview, usage
from core.db.session import Database
from core.principal import Principal
from core.storage import LocalStore
from tests.support.factories import add_base_model, add_project, must_claim, queue_job, submit

pytestmark = pytest.mark.usefixtures("_base_model")


@pytest.fixture
def _base_model(database: Database) -> None:
    add_base_model(database)


def totals(database: Database, principal: Principal = LOCAL) -> dict[str, tuple[int, int, float]]:
    """Return status → jobs, tokens and seconds; the test's own seconds are rounded away."""
    with database.session() as session:
        return {
            row.status: (row.jobs, row.trained_tokens, round(row.used_seconds, -2))
            for row in usage.list_totals(session, principal)
        }


def seen(database: Database) -> overview.Totals:
    with database.session() as session:
        return overview.read_totals(session, worker_silence_seconds=30)


def train(database: Database, tokens: int, seconds: float) -> jobs.Claim:
    """Return the claim of a job that has been trained for hundreds of seconds."""
    claim = must_claim(database, "w")
    jobs.record(database, claim, "w", [jobs.ProgressUpdate(step=1, trained_tokens=tokens)])
    with database.session(write=True) as session:
        session.execute(
            update(Job)
            .where(Job.id == claim.job_id)
            .values(attempt_started_epoch=Job.attempt_started_epoch - seconds)
        )
    return claim


def test_every_way_to_end_counts_once_and_for_its_project(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    other = add_project(database, "other")
    for tokens in (100, 50):
        queue_job(database, store, settings)
        jobs.fail(database, train(database, tokens, 700), "w", {"code": "broken", "message": ""})
    with database.session(write=True) as session:
        jobs.cancel(session, other, submit(database, store, settings, other).id)
    queue_job(database, store, settings)
    jobs.cancelled(database, train(database, 1, 300), "w")
    queue_job(database, store, settings)
    must_claim(database, "w", lease_seconds=-1)
    assert seen(database).expired_leases == 1
    jobs.sweep(database, "s", 30, max_attempts=1)
    assert totals(database) == {"failed": (3, 150, 1400), "cancelled": (1, 1, 300)}
    assert totals(database, other) == {"cancelled": (1, 0, 0)}
    assert seen(database).ended == {"failed": 3, "cancelled": 2}
    assert seen(database).expired_leases == 0


def test_an_end_that_is_not_committed_does_not_count(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    with suppress(RuntimeError), database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
        raise RuntimeError
    assert totals(database) == {}


def test_a_job_that_is_tried_again_ends_twice_and_its_tokens_count_once(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    queue_job(database, store, settings)
    claim = train(database, 100, 700)
    jobs.fail(database, claim, "w", {"code": "broken", "message": ""})
    with database.session(write=True) as session:
        jobs.retry(session, LOCAL, claim.job_id, settings=settings)
    assert totals(database) == {"failed": (1, 0, 700)}
    again = train(database, 160, 500)
    assert again.job_id == claim.job_id
    assert seen(database).trained_tokens == 160
    jobs.fail(database, again, "w", {"code": "broken", "message": ""})
    assert totals(database) == {"failed": (2, 160, 1200)}


def test_removing_a_job_changes_no_total(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    jobs.fail(database, train(database, 10, 500), "w", {"code": "broken", "message": ""})
    with database.session(write=True) as session:
        jobs.delete(session, LOCAL, job.id)
    assert totals(database) == {"failed": (1, 10, 500)}


def test_operators_see_what_has_not_ended(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    queue_job(database, store, settings)
    old = queue_job(database, store, settings)
    submit(database, store, settings)
    jobs.fail(database, train(database, 10, 0), "w", {"code": "broken", "message": ""})
    urgent = queue_job(database, store, settings, priority=9)
    claim = train(database, 1000, 0)
    assert claim.job_id == urgent.id
    jobs.register_worker(database, "w", "train", "host", 1, claim.job_id)
    jobs.register_worker(database, "silent", "train", "host", 1, None)
    with database.session(write=True) as session:
        session.execute(
            text("UPDATE workers SET heartbeat_epoch = heartbeat_epoch - 60 WHERE id = 'silent'")
        )
    found = seen(database)
    assert found.unfinished == {"validating": 1, "queued": 1, "running": 1, "paused": 0}
    assert found.oldest["queued"] == old.created_at
    assert found.trained_tokens == 1010
    assert found.workers == {"train": 1}
    assert found.deliveries == {"pending": 0, "dead": 0}

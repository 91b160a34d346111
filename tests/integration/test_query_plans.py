"""No read or write of a running service costs more because the tables have grown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest

import migrations
from core import jobs
from core.config import Settings
from core.db.models import utc_now
from core.db.repositories import overview
from core.db.repositories.housekeeping import HousekeepingRepository
from core.db.repositories.webhooks import WebhookRepository
from core.db.session import Database
from core.job_status import UNFINISHED
from core.storage import LocalStore
from core.webhooks.delivery import deliver_due
from core.webhooks.sending import Sender
from tests.support import many_jobs
from tests.support.databases import PostgresServer
from tests.support.factories import make_spec, must_claim
from tests.support.many_jobs import EVENTS_PER_JOB, RARE_MODEL, job_id, owner
from tests.support.query_plans import Plan, explained

JOBS = 20_000
# Their statuses, by the numbers of `many_jobs`; 0, 80 and 19_999 are of one project each.
FAILED, SUCCEEDED, QUEUED = 0, 80, JOBS - 1

# Fewer than one project's jobs, more than wait in all projects together.
_MAX_TOUCHED_ROWS = 1000
_MAX_SORTED_ROWS = 300


@dataclass(frozen=True)
class World:
    """A database with many jobs, and what the functions need besides."""

    database: Database
    store: LocalStore
    settings: Settings


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
)
def grown_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('grown') / 'grown.db'}"
        _grow(url)
        yield url
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.empty_database() as url:
        _grow(url)
        yield url


def _grow(url: str) -> None:
    migrations.upgrade(url)
    database = Database(url)
    many_jobs.fill(database, JOBS)
    database.close()


@pytest.fixture
def world(grown_url: str, settings: Settings, store: LocalStore) -> Iterator[World]:
    database = Database(grown_url)
    yield World(database, store, settings)
    database.close()


def read_a_queued_job(world: World) -> None:
    with world.database.session() as session:
        assert jobs.get(session, owner(QUEUED), job_id(QUEUED)).status == "queued"


def read_an_ended_job(world: World) -> None:
    with world.database.session() as session:
        assert jobs.get(session, owner(SUCCEEDED), job_id(SUCCEEDED)).status == "succeeded"


def list_jobs(**chosen: str) -> Callable[[World], None]:
    def act(world: World) -> None:
        with world.database.session() as session:
            first = jobs.list_jobs(session, owner(SUCCEEDED), limit=50, **chosen)
            if first.next_cursor:
                jobs.list_jobs(
                    session, owner(SUCCEEDED), limit=50, cursor=first.next_cursor, **chosen
                )

    return act


def read_events(world: World) -> None:
    with world.database.session() as session:
        page = jobs.events(session, owner(SUCCEEDED), job_id(SUCCEEDED), after=1, limit=100)
        assert len(page.data) == EVENTS_PER_JOB - 1


def read_metrics(world: World) -> None:
    with world.database.session() as session:
        first = jobs.metrics(session, owner(SUCCEEDED), job_id(SUCCEEDED), limit=50)
        rest = jobs.metrics(
            session, owner(SUCCEEDED), job_id(SUCCEEDED), cursor=first.next_cursor, attempt=2
        )
        assert (len(first.data), len(rest.data)) == (50, 50)


def read_a_log(world: World) -> None:
    with world.database.session() as session:
        chosen = (owner(SUCCEEDED), job_id(SUCCEEDED))
        last = jobs.read_log(session, *chosen, limit=10)
        assert [line.text for line in last.data] == ["a line"] * 10
        rest = jobs.read_log(session, *chosen, after=last.data[0].id, attempt=2, limit=5)
        assert (len(rest.data), rest.next_cursor is not None) == (5, True)


def submit_with_a_key(world: World) -> None:
    with world.database.session(write=True) as session:
        spec = make_spec(dataset="file-0")
        _, new = jobs.submit(
            session,
            owner(0),
            spec,
            settings=world.settings,
            idempotency_key="a key",
            store=world.store,
        )
        assert new


def cancel_and_delete(world: World) -> None:
    with world.database.session(write=True) as session:
        spec = make_spec(dataset="file-0")
        job, _ = jobs.submit(session, owner(0), spec, settings=world.settings, store=world.store)
        jobs.cancel(session, owner(0), job.id)
        jobs.delete(session, owner(0), job.id)


def control_a_job(world: World) -> None:
    chosen = (owner(QUEUED), job_id(QUEUED))
    with world.database.session(write=True) as session:
        jobs.set_priority(session, *chosen, 3)
        jobs.pause(session, *chosen)
        jobs.resume(session, *chosen)
        jobs.set_priority(session, *chosen, 0)


def retry_a_job(world: World) -> None:
    with world.database.session(write=True) as session:
        jobs.retry(session, owner(FAILED), job_id(FAILED), settings=world.settings)
        jobs.cancel(session, owner(FAILED), job_id(FAILED))


def list_deliveries(world: World) -> None:
    with world.database.session() as session:
        found = WebhookRepository(session, owner(0)).list_deliveries(
            "webhook-0", before=None, limit=20
        )
        assert len(found) == 20


def deliver_webhooks(world: World) -> None:
    sender = Sender(timeout_seconds=1, allow_private=False, resolver=lambda *_: ())
    assert deliver_due(world.database, world.settings, threading.Event(), sender=sender) > 0


def keep_house(world: World) -> None:
    """Look for what is past its time, of which there is nothing."""
    ten_years = 10 * 365 * 86_400.0
    long_ago = utc_now() - timedelta(seconds=ten_years)
    with world.database.session(write=True) as session:
        rows = HousekeepingRepository(session)
        assert rows.remove_jobs(long_ago, jobs=100, rows=1000).jobs == 0
        assert rows.remove_deliveries(time.time() + ten_years, 1000) == 0
        assert rows.remove_idempotency_keys(long_ago, 1000) == 0
        assert rows.referenced_blobs(["0" * 64]) == set()
        assert rows.referenced_adapters(["0" * 64]) == set()


def validate_a_job(world: World) -> None:
    claim = must_claim(world.database, "light", "validate")
    jobs.heartbeat(world.database, claim, "light", 30)
    jobs.validated(world.database, claim, "light", {})


def train_a_job(world: World) -> None:
    claim = must_claim(world.database, "w")
    jobs.begin_training(world.database, claim, "w", resumed=None)
    jobs.heartbeat(world.database, claim, "w", 30)
    updates = [
        jobs.ProgressUpdate(step=1, total_steps=2),
        jobs.EventUpdate("note"),
        jobs.MetricUpdate(step=1, loss=1.0),
    ]
    jobs.record(world.database, claim, "w", updates, output="a line\n", max_log_bytes=100)
    jobs.fail(world.database, claim, "w", {"code": "broken", "message": ""})


def sweep(world: World) -> None:
    must_claim(world.database, "gone", lease_seconds=-1)
    assert jobs.sweep(world.database, "s", 30, max_attempts=3) == 1


def look_at_held_jobs(world: World) -> None:
    assert jobs.held_attempts(world.database)


def scrape(world: World) -> None:
    with world.database.session() as session:
        totals = overview.read_totals(session, worker_silence_seconds=30)
        assert all(totals.unfinished[status] for status in UNFINISHED)


ACTS: dict[str, Callable[[World], None]] = {
    "read_a_queued_job": read_a_queued_job,
    "read_an_ended_job": read_an_ended_job,
    "list_all": list_jobs(),
    "list_by_status": list_jobs(status="failed"),
    "list_by_adapter": list_jobs(adapter="bot-80"),
    "list_by_base_model": list_jobs(base_model=RARE_MODEL),
    "list_by_all": list_jobs(status="succeeded", adapter="bot-80", base_model="tiny"),
    "read_events": read_events,
    "read_metrics": read_metrics,
    "read_a_log": read_a_log,
    "submit_with_a_key": submit_with_a_key,
    "cancel_and_delete": cancel_and_delete,
    "control_a_job": control_a_job,
    "retry_a_job": retry_a_job,
    "list_deliveries": list_deliveries,
    "deliver_webhooks": deliver_webhooks,
    "keep_house": keep_house,
    "validate_a_job": validate_a_job,
    "train_a_job": train_a_job,
    "sweep": sweep,
    "look_at_held_jobs": look_at_held_jobs,
    "scrape": scrape,
}


def faults(plan: Plan) -> list[str]:
    """Return what makes a statement slower with every row."""
    found = [f"reads all of {table}" for table in sorted(plan.scanned)]
    if plan.sorted_rows > _MAX_SORTED_ROWS:
        found.append(f"sorts {plan.sorted_rows} rows")
    if plan.touched_rows > _MAX_TOUCHED_ROWS:
        found.append(f"looks at {plan.touched_rows} rows")
    return found


@pytest.mark.parametrize("name", ACTS)
def test_no_statement_reads_more_because_there_is_more(world: World, name: str) -> None:
    with explained(world.database) as plans:
        ACTS[name](world)
    assert plans.all, "nothing was asked of the database"
    slow = [
        f"{', '.join(faults(plan))}:\n{plan.statement}\n{plan.text}"
        for plan in plans.all
        if faults(plan)
    ]
    assert not slow, "\n\n".join(slow)


def test_a_list_passes_no_jobs_that_are_not_in_it(world: World) -> None:
    with explained(world.database) as plans:
        list_jobs()(world)
        list_jobs(status="succeeded")(world)
    assert all(plan.touched_rows <= 51 for plan in plans.all), str(plans)


@pytest.mark.parametrize(
    "statement",
    ["SELECT id FROM jobs WHERE step = -1", "SELECT id FROM jobs ORDER BY step"],
)
def test_a_statement_that_reads_everything_is_noticed(world: World, statement: str) -> None:
    with explained(world.database) as plans, world.database.session() as session:
        session.connection().exec_driver_sql(statement)
    (plan,) = plans.all
    assert faults(plan), plan.text

from __future__ import annotations

import threading
import time

from sqlalchemy import event

from core import jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.models import Job
from core.db.session import Database
from core.storage import LocalStore
from tests.support.factories import add_base_model, must_claim, queue_job
from tests.support.polling import wait_until
from worker.lease import Lease

STEPS = 25
STEP_SECONDS = 0.1
LEASE_SECONDS = 30.0


def lease_expiry(database: Database, job_id: str) -> float:
    with database.session() as session:
        job = session.get(Job, job_id)
        assert job is not None
        assert job.lease_expires_epoch is not None
        return job.lease_expires_epoch


def test_a_running_job_costs_few_transactions_and_loses_nothing(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database)
    queue_job(database, store, settings)
    claim = must_claim(database, "w")
    commits: list[float] = []
    renewals: list[float] = []
    lease = Lease(
        database, claim, "w", LEASE_SECONDS, on_renewal=lambda: renewals.append(time.monotonic())
    )
    event.listen(database.engine, "commit", lambda _: commits.append(time.monotonic()))
    started = time.monotonic()
    with lease:
        for step in range(1, STEPS + 1):
            lease.add(jobs.ProgressUpdate(step=step, total_steps=STEPS))
            lease.add(jobs.MetricUpdate(step=step, loss=1.0))
            lease.add(jobs.EventUpdate("step", {"step": step}))
            time.sleep(STEP_SECONDS)
        lease.conclude(jobs.release, threading.Event())
    seconds = time.monotonic() - started
    # Renewals go with what is written anyway: they are transactions of their own only when idle.
    assert len(commits) <= 2.5 * seconds + 2, f"{len(commits)} transactions in {seconds:.1f} s"
    assert len(renewals) >= 2
    with database.session() as session:
        assert len(jobs.metrics(session, LOCAL, claim.job_id).data) == STEPS
        events = jobs.events(session, LOCAL, claim.job_id, limit=200).data
    assert [entry.data["step"] for entry in events if entry.type == "step"] == [
        *range(1, STEPS + 1)
    ]


def test_an_idle_job_keeps_its_lease(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database)
    queue_job(database, store, settings)
    claim = must_claim(database, "w", lease_seconds=3)
    first = lease_expiry(database, claim.job_id)
    with Lease(database, claim, "w", LEASE_SECONDS) as lease:
        wait_until(
            lambda: lease_expiry(database, claim.job_id) > first + 20, 10, "it was not renewed"
        )
        with database.session(write=True) as session:
            jobs.cancel(session, LOCAL, claim.job_id)
        wait_until(lambda: lease.stop_reason == "cancel", 5, "the request was not heard")

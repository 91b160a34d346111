"""What owners do to jobs beside submitting them; every order of it is in `test_job_states`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import update

from core import datasets, jobs
from core.auth import LOCAL
from core.capabilities import Capabilities
from core.config import Settings
from core.db.models import Dataset, Job
from core.db.repositories import usage
from core.db.session import Database
from core.errors import Conflict
from core.jobs import ProgressUpdate
from core.storage import ArtifactStore
from tests.support.factories import (
    add_base_model,
    add_dataset,
    must_claim,
    queue_job,
    submit,
)

GIB = 1024**3


@pytest.fixture(autouse=True)
def _base_model(database: Database) -> None:
    add_base_model(database)


def act(database: Database, action: Any, job_id: str, **details: Any) -> jobs.JobRead:
    with database.session(write=True) as session:
        changed: jobs.JobRead = action(session, LOCAL, job_id, **details)
    return changed


def read(database: Database, job_id: str, settings: Settings | None = None) -> jobs.JobRead:
    with database.session() as session:
        return jobs.get(session, LOCAL, job_id, settings=settings)


def test_a_running_job_is_paused_by_its_worker_and_goes_on_from_its_checkpoint(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    assert act(database, jobs.pause, job.id).stop_requested == "pause"
    assert jobs.heartbeat(database, claim, "w", 30) == "pause"
    blob = store.write_blob([b"state"], 100)
    jobs.add_checkpoint(database, claim, "w", step=7, blob=blob, store=store)
    jobs.release(database, claim, "w")
    paused = read(database, job.id)
    assert (paused.status, paused.stop_requested) == ("paused", None)
    assert jobs.claim(database, worker_id="w", stage="train", lease_seconds=30) is None

    assert act(database, jobs.resume, job.id).status == "queued"
    again = must_claim(database, "w")
    assert [(saved.step, saved.attempt) for saved in again.checkpoints] == [(7, 2)]
    with database.session() as session:
        (shown,) = jobs.checkpoints(session, LOCAL, job.id).data
    assert (shown.step, shown.attempt, shown.bytes, shown.usable) == (7, 2, 5, True)
    jobs.reject_checkpoint(
        database, again, "w", checkpoint=again.checkpoints[0], reason="a byte is wrong"
    )
    with database.session() as session:
        (shown,) = jobs.checkpoints(session, LOCAL, job.id).data
    assert (shown.usable, shown.reason) == (False, "a byte is wrong")


def test_a_job_paused_before_it_was_checked_is_checked_later(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    assert act(database, jobs.pause, job.id).status == "paused"
    assert act(database, jobs.resume, job.id).status == "validating"
    claim = must_claim(database, "light", "validate")
    act(database, jobs.pause, job.id)
    jobs.validated(database, claim, "light", {"rows": 1})
    assert read(database, job.id).status == "paused"
    assert act(database, jobs.resume, job.id).status == "queued", "it is not checked again"


def test_a_retried_job_begins_with_a_clean_slate_and_its_checkpoints(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    blob = store.write_blob([b"state"], 100)
    jobs.add_checkpoint(database, claim, "w", step=3, blob=blob, store=store)
    jobs.record(database, claim, "w", [ProgressUpdate(step=3, trained_tokens=50)])
    with database.session(write=True) as session:
        session.execute(
            update(Job).values(used_seconds=100.0, attempt_started_epoch=None, lost_attempts=2)
        )
    jobs.fail(database, claim, "w", {"code": "broken", "message": "it broke"})

    retried = act(database, jobs.retry, job.id, settings=settings)
    assert (retried.status, retried.error, retried.finished_at) == ("queued", None, None)
    with database.session() as session:
        (total,) = usage.list_totals(session, LOCAL)
        assert (total.jobs, total.trained_tokens, total.used_seconds) == (1, 0, 100)
    again = must_claim(database, "w")
    assert (again.used_seconds, [saved.step for saved in again.checkpoints]) == (0, [3])
    jobs.attempt_lost(database, again, "w", reason="it died", max_attempts=3)
    assert read(database, job.id).status == "queued", "earlier losses do not count"


def test_a_job_whose_data_set_is_gone_cannot_be_retried(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    dataset = add_dataset(database, store)
    job = submit(database, store, settings, dataset=dataset.id)
    act(database, jobs.cancel, job.id)
    with database.session(write=True) as session:
        datasets.delete(session, LOCAL, dataset.id)
    with pytest.raises(Conflict) as caught:
        act(database, jobs.retry, job.id, settings=settings)
    assert caught.value.code == "input_missing"
    assert read(database, job.id).status == "cancelled"


def test_a_job_that_became_urgent_is_taken_next(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    first, second = (queue_job(database, store, settings) for _ in range(2))
    changed = act(database, jobs.set_priority, second.id, priority=3)
    assert (changed.priority, changed.spec.priority) == (3, 3)
    assert changed.progress.queue_position == 0
    assert read(database, first.id).progress.queue_position == 1
    assert must_claim(database, "w").job_id == second.id


def test_an_owner_and_a_worker_at_the_same_moment_leave_one_truth(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    for action in (jobs.pause, jobs.cancel):
        for _ in range(5):
            job = queue_job(database, store, settings)
            start = threading.Barrier(2)

            def take(job_id: str = job.id, start: threading.Barrier = start) -> bool:
                start.wait()
                found = jobs.claim(database, worker_id="w", stage="train", lease_seconds=30)
                if found is None:
                    return False
                assert found.job_id == job_id
                jobs.release(database, found, "w")
                return True

            with ThreadPoolExecutor(1) as pool:
                taking = pool.submit(take)
                start.wait()
                act(database, action, job.id)
                taking.result(20)
            expected = "paused" if action is jobs.pause else "cancelled"
            assert read(database, job.id).status == expected


def report_worker(database: Database, name: str, queue: str, *have: Any, **more: Any) -> None:
    jobs.register_worker(database, name, queue, "host", 1, None, Capabilities(*have, **more))


def test_a_job_that_no_worker_can_run_tells_why(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    def reason() -> str | None:
        return read(database, job.id, settings).progress.waiting_reason

    waiting = submit(database, store, settings, resources={"device": "cuda"})
    found = read(database, waiting.id, settings).progress.waiting_reason
    assert found == "no light worker is running, which would validate it"
    report_worker(database, "l", "light")
    assert read(database, waiting.id, settings).progress.waiting_reason is None
    act(database, jobs.cancel, waiting.id)

    job = queue_job(database, store, settings, resources={"device": "cuda"})
    with database.session(write=True) as session:
        session.execute(update(Job).values(required_cuda_memory_bytes=12 * GIB))
    assert reason() == "no train worker is running"
    report_worker(database, "a", "train", "cpu", 64 * GIB)
    assert reason() == "no live worker has the device 'cuda'"
    report_worker(database, "b", "train", "cuda", 8 * GIB)
    assert reason() == (
        "it needs an estimated 12.0 GiB of memory and no live worker offers more than 8.0 GiB"
    )
    absent = frozenset({"tiny"})
    report_worker(database, "c", "train", "cuda", 24 * GIB, absent_base_models=absent)
    assert reason() == "no live worker's machine has the files of the base model 'tiny'"
    report_worker(database, "c", "train", "cuda", 24 * GIB)
    assert reason() is None
    must_claim(database, "w")
    other = queue_job(database, store, settings)
    limited = settings.model_copy(update={"quota_running_jobs": 1})
    assert read(database, other.id, limited).progress.waiting_reason == (
        "the project has 1 jobs in training and may have 1 at once"
    )
    assert read(database, other.id, settings).progress.waiting_reason is None


def test_the_time_to_wait_is_estimated_from_what_was_and_what_runs(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    done = [queue_job(database, store, settings) for _ in range(2)]
    running = queue_job(database, store, settings)
    first, second = (queue_job(database, store, settings) for _ in range(2))
    report_worker(database, "a", "train", "cpu")
    assert read(database, second.id).progress.starts_in_seconds is None, "there is no history"
    with database.session(write=True) as session:
        for job, seconds in zip(done, (100.0, 200.0), strict=True):
            session.execute(
                update(Job).where(Job.id == job.id).values(status="succeeded", used_seconds=seconds)
            )
    claim = must_claim(database, "w")
    assert claim.job_id == running.id
    jobs.record(database, claim, "w", [ProgressUpdate(step=1, eta_seconds=50.0)])

    progress = read(database, second.id).progress
    assert progress.queue_position == 1
    assert (progress.starts_in_seconds, progress.eta_seconds) == (200.0, 350.0)
    report_worker(database, "b", "train", "cpu")
    assert read(database, first.id).progress.starts_in_seconds == 0.0, "the second worker is free"
    assert read(database, second.id).progress.starts_in_seconds == 100.0


def test_fifty_requests_with_one_key_make_one_job(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    start = threading.Barrier(50)
    # One place is left: all but one of the requests could not have a job of their own.
    limited = settings.model_copy(update={"quota_queued_jobs": 1})

    def send(_: int) -> str:
        start.wait()
        return submit(database, store, limited, key="k").id

    with ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(send, range(50)))
    assert len(ids) == 1
    with database.session() as session:
        assert len(jobs.list_jobs(session, LOCAL).data) == 1
        assert session.query(Dataset).count() == 1

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from core import jobs
from core.db.models import AdapterVersion, Job
from core.principal import LOCAL
from core.queue import NullQueue
from tests.support.polling import wait_until
from tests.support.worker_jobs import BASE_DIGEST, JobBench
from worker.lease import Lease


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[JobBench]:
    opened = JobBench(tmp_path / "data")
    yield opened
    opened.close()


def test_a_job_is_trained_published_and_leaves_nothing_behind(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("succeed")
    job = bench.wait_for(job_id, "succeeded")
    assert job.version is not None
    assert job.version.version == 1
    assert bench.store.has_adapter(job.version.digest)
    assert job.progress.step == 3
    with bench.database.session() as session:
        metrics = jobs.metrics(session, LOCAL, job_id).data
        version = session.query(AdapterVersion).one()
    assert [(metric.step, metric.loss) for metric in metrics] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert version.base_digest == BASE_DIGEST
    assert version.provenance == {"steps": 3}
    types = bench.event_types(job_id)
    assert types[-3:] == ["training_started", "chatter", "succeeded"]
    assert bench.work_left() == []


def test_a_runner_works_until_nothing_is_left_and_sleeps_until_it_is_woken(
    bench: JobBench,
) -> None:
    first, second = bench.submit(), bench.submit()
    runner = bench.runner("succeed", idle_poll_seconds=60)
    bench.wait_for(first, "succeeded")
    bench.wait_for(second, "succeeded")
    third = bench.submit()
    runner.wake()
    runner.wake()
    bench.wait_for(third, "succeeded", 10)
    assert bench.event_types(third).count("training_started") == 1


def test_an_idle_runner_finds_work_that_nobody_told_it_of(bench: JobBench) -> None:
    bench.runner("succeed", idle_poll_seconds=0.2)
    wait_until(lambda: _workers(bench), 10, "the worker did not register")
    bench.wait_for(bench.submit(), "succeeded")


def test_a_running_job_is_cancelled_at_the_step_boundary(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("stop_slowly")
    bench.wait_for_work(job_id)
    bench.cancel(job_id)
    bench.wait_for(job_id, "cancelled", 5)
    assert bench.work_left() == []


def test_a_job_that_hangs_is_cancelled_by_force_after_the_grace_period(bench: JobBench) -> None:
    job_id, next_id = bench.submit(), bench.submit()
    bench.runner("hang", grace_seconds=0.5)
    bench.wait_for_work(job_id)
    bench.cancel(next_id)
    bench.cancel(job_id)
    bench.wait_for(job_id, "cancelled", 6)
    assert bench.job(next_id).status == "cancelled"


def test_a_crash_gives_the_job_another_attempt(bench: JobBench) -> None:
    job_id = bench.submit()
    with bench.database.session(write=True) as session:
        session.execute(update(Job).values(attempt=0))
    bench.runner("crash_once")
    job = bench.wait_for(job_id, "succeeded")
    assert job.attempt == 2
    types = bench.event_types(job_id)
    assert types.index("crashing") < types.index("requeued") < types.index("succeeded")


def test_a_job_that_crashes_every_attempt_fails_and_says_how_it_ended(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("crash", max_attempts=2)
    job = bench.wait_for(job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "attempts_exhausted"
    assert "SIGKILL" in job.error["message"]
    assert bench.event_types(job_id).count("crashing") == 2


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [("refuse", "invalid_dataset", 3), ("break_down", "internal_error", None)],
)
def test_a_reported_failure_ends_the_job_with_its_code(
    bench: JobBench, mode: str, code: str, line: int | None
) -> None:
    job_id = bench.submit()
    bench.runner(mode)
    job = bench.wait_for(job_id, "failed")
    assert job.error is not None
    assert (job.error["code"], job.error.get("line")) == (code, line)
    assert job.attempt == 2  # one to validate, one to train


def test_rows_that_are_gone_fail_the_job(bench: JobBench) -> None:
    job_id = bench.submit()
    for blob in (bench.settings.root / "blobs").iterdir():
        blob.unlink()
    bench.runner("succeed")
    job = bench.wait_for(job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "blob_missing"


def test_a_runner_that_shuts_down_gives_its_job_back(bench: JobBench) -> None:
    job_id = bench.submit()
    runner = bench.runner("stop_slowly")
    bench.wait_for_work(job_id)
    runner.stop()
    assert runner.join(5)
    job = bench.job(job_id)
    assert job.status == "queued"
    assert bench.event_types(job_id)[-1] == "released"
    assert _workers(bench) == []
    bench.runner("succeed")
    bench.wait_for(job_id, "succeeded")


def test_a_runner_that_lost_its_lease_stops_its_child_and_publishes_nothing(
    bench: JobBench,
) -> None:
    job_id = bench.submit()
    runner = bench.runner("stop_slowly", idle_poll_seconds=60)
    bench.wait_for_work(job_id)
    with bench.database.session(write=True) as session:
        session.execute(update(Job).values(worker_id="another", attempt=Job.attempt + 1))
    wait_until(lambda: bench.work_left() == [], 10, "the runner went on")
    job = bench.job(job_id)
    assert job.status == "running"
    assert "succeeded" not in bench.event_types(job_id)
    assert runner.join(0) is False


def test_a_dead_workers_job_and_files_are_cleaned_up_by_an_idle_one(bench: JobBench) -> None:
    job_id = bench.submit()
    claim = jobs.claim(bench.database, worker_id="dead", stage="train", lease_seconds=0.1)
    assert claim is not None
    abandoned = bench.settings.root / "work" / f"{job_id}-{claim.attempt}"
    abandoned.mkdir(parents=True)
    other_id = bench.submit()
    live = jobs.claim(bench.database, worker_id="alive", stage="train", lease_seconds=60)
    assert live is not None
    kept = bench.settings.root / "work" / f"{other_id}-{live.attempt}"
    kept.mkdir()
    bench.runner("succeed")
    bench.wait_for(job_id, "succeeded")
    wait_until(lambda: bench.work_left() == [kept.name], 5, lambda: str(bench.work_left()))


def test_the_list_of_workers_tells_who_works_on_what(bench: JobBench) -> None:
    job_id = bench.submit()
    runner = bench.runner("stop_slowly")
    wait_until(lambda: (runner.worker_id, job_id) in _workers(bench), 10, "not in the list")


def test_a_new_job_is_validated_queued_and_the_train_workers_woken(bench: JobBench) -> None:
    job_id = bench.submit(validated=False)
    queue = NullQueue()
    bench.light_runner("validate", queue)
    bench.wait_for(job_id, "queued")
    wait_until(lambda: queue.woken == ["train"], 5, "nobody was woken")
    with bench.database.session() as session:
        (event,) = [
            event for event in jobs.events(session, LOCAL, job_id).data if event.type == "validated"
        ]
    assert event.data == {"rows": 3}


@pytest.mark.parametrize(
    ("mode", "code"), [("refuse", "invalid_dataset"), ("crash", "attempts_exhausted")]
)
def test_a_job_that_cannot_be_validated_fails_and_wakes_nobody(
    bench: JobBench, mode: str, code: str
) -> None:
    job_id = bench.submit(validated=False)
    queue = NullQueue()
    bench.light_runner(mode, queue)
    job = bench.wait_for(job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == code
    assert queue.woken == []


def test_an_end_that_the_database_did_not_take_is_written_again(bench: JobBench) -> None:
    job_id = bench.submit()
    claim = jobs.claim(bench.database, worker_id="w", stage="train", lease_seconds=60)
    assert claim is not None
    tries: list[str] = []

    def release_at_second_try(*arguments: Any) -> None:
        tries.append(bench.job(job_id).status)
        if len(tries) == 1:
            raise OperationalError("COMMIT", {}, Exception("the server went away"))
        jobs.release(*arguments)

    with Lease(bench.database, claim, "w", lease_seconds=60) as lease:
        lease.add(jobs.EventUpdate("reported_before"))
        lease.conclude(release_at_second_try, threading.Event())
    assert tries == ["running", "running"]
    assert bench.job(job_id).status == "queued"
    assert bench.event_types(job_id)[-2:] == ["reported_before", "released"]


def _workers(bench: JobBench) -> list[tuple[str, str | None]]:
    with bench.database.session() as session:
        return [(worker.id, worker.job_id) for worker in jobs.list_workers(session)]

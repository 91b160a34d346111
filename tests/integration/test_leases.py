from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from core import jobs, registry
from core.auth import LOCAL
from core.config import Settings
from core.db.models import BaseModel
from core.db.session import Database
from core.errors import LeaseLost, Unavailable
from core.jobs import Claim, EventUpdate, MetricUpdate, ProgressUpdate
from core.storage import LocalStore
from tests.support.factories import (
    add_base_model,
    make_artifact,
    must_claim,
    publish_artifact,
    queue_job,
    submit,
)


@pytest.fixture(autouse=True)
def _base_model(database: Database) -> None:
    add_base_model(database)


def _events(database: Database, job_id: str) -> list[tuple[int, str]]:
    with database.session() as session:
        page = jobs.events(session, LOCAL, job_id, limit=1000)
    return [(event.id, event.type) for event in page.data]


def _get(database: Database, job_id: str) -> jobs.JobRead:
    with database.session() as session:
        return jobs.get(session, LOCAL, job_id)


def _snapshot(database: Database, job_id: str) -> tuple[Any, ...]:
    with database.session() as session:
        return (
            jobs.get(session, LOCAL, job_id),
            jobs.events(session, LOCAL, job_id, limit=1000),
            jobs.metrics(session, LOCAL, job_id),
            registry.list_adapters(session, LOCAL),
        )


def test_a_job_is_validated_then_queued_then_trained(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    job = submit(database, store, settings, adapter="bot")
    assert jobs.claim(database, worker_id="w", stage="train", lease_seconds=30) is None
    check = must_claim(database, "light", "validate")
    assert (check.job_id, check.attempt, check.base.name) == (job.id, 1, "tiny")
    assert store.blob_path(check.sources[0].sha256).is_file()
    jobs.validated(database, check, "light", {"rows": 1})
    assert _get(database, job.id).status == "queued"

    claim = must_claim(database, "trainer")
    assert (claim.attempt, claim.adapter_name, claim.stop_requested) == (2, "bot", None)
    running = _get(database, job.id)
    assert (running.status, running.progress.stage) == ("running", "train")
    assert running.started_at is not None

    published = publish_artifact(store, tmp_path / "artifact")
    jobs.succeed(
        database,
        claim,
        "trainer",
        manifest=published.manifest,
        bytes=published.bytes,
        report={"samples": []},
        provenance={"final_loss": math.nan},
        store=store,
    )
    done = _get(database, job.id)
    assert done.status == "succeeded"
    assert done.version is not None
    assert (done.version.name, done.version.version) == ("bot", 1)
    assert done.finished_at is not None
    with database.session() as session:
        assert registry.resolve(session, LOCAL, "bot").digest == published.digest
        assert jobs.report(session, LOCAL, job.id) == {"samples": []}
        version = registry.get_version(session, LOCAL, "bot", 1)
    assert version.provenance == {"final_loss": None}
    assert version.aliases == ["latest"]
    assert _events(database, job.id) == [
        (1, "created"),
        (2, "validation_started"),
        (3, "validated"),
        (4, "training_started"),
        (5, "succeeded"),
    ]


def test_claims_go_by_priority_and_then_by_age(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    low, first, second, high = (
        queue_job(database, store, settings, priority=priority).id for priority in (-1, 0, 0, 5)
    )
    assert [_get(database, job).progress.queue_position for job in (low, first, second, high)] == [
        3,
        1,
        2,
        0,
    ]
    taken = [must_claim(database, "w").job_id for _ in range(4)]
    assert taken == [high, first, second, low]
    assert jobs.claim(database, worker_id="w", stage="train", lease_seconds=30) is None


def test_racing_workers_never_get_the_same_job(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    waiting = {submit(database, store, settings).id for _ in range(24)}
    start = threading.Barrier(8)

    def work(number: int) -> list[str]:
        start.wait()
        taken = []
        while claim := jobs.claim(
            database, worker_id=f"w{number}", stage="validate", lease_seconds=30
        ):
            taken.append(claim.job_id)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for jobs_taken in pool.map(work, range(8)) for job_id in jobs_taken]
    assert len(taken) == len(waiting)
    assert set(taken) == waiting


def test_a_worker_taken_for_dead_changes_nothing(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    job = queue_job(database, store, settings)
    zombie = must_claim(database, "old", lease_seconds=-1)
    assert jobs.sweep(database, "sweeper", 30, max_attempts=3) == 1
    current = must_claim(database, "old")  # the same worker id: only the attempt tells them apart
    assert current.attempt == zombie.attempt + 1
    manifest = make_artifact(tmp_path / "artifact")
    before = _snapshot(database, job.id)

    def succeed(claim: Claim) -> None:
        jobs.succeed(
            database,
            claim,
            "old",
            manifest=manifest,
            bytes=1,
            report={},
            provenance={},
            store=store,
        )

    writes: dict[str, Callable[[], object]] = {
        "heartbeat": lambda: jobs.heartbeat(database, zombie, "old", 30),
        "record": lambda: jobs.record(
            database,
            zombie,
            "old",
            [EventUpdate("log"), MetricUpdate(step=1, loss=1.0), ProgressUpdate(step=1)],
        ),
        "fail": lambda: jobs.fail(database, zombie, "old", {"code": "x", "message": "y"}),
        "cancelled": lambda: jobs.cancelled(database, zombie, "old"),
        "release": lambda: jobs.release(database, zombie, "old"),
        "validated": lambda: jobs.validated(database, zombie, "old", {}),
        "succeed": lambda: succeed(zombie),
    }
    for name, write in writes.items():
        with pytest.raises(LeaseLost):
            write()
        assert _snapshot(database, job.id) == before, name
    with pytest.raises(LeaseLost):
        jobs.heartbeat(database, current, "another worker", 30)
    assert jobs.heartbeat(database, current, "old", 30) is None


def test_publishing_is_refused_when_the_files_are_gone(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    published = publish_artifact(store, tmp_path / "artifact")
    store.delete_adapter(published.digest)
    before = _snapshot(database, job.id)
    with pytest.raises(Unavailable) as caught:
        jobs.succeed(
            database,
            claim,
            "w",
            manifest=published.manifest,
            bytes=1,
            report={},
            provenance={},
            store=store,
        )
    assert caught.value.code == "artifact_gone"
    assert _snapshot(database, job.id) == before


def test_updates_are_stored_together_and_numbered_without_gaps(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    jobs.record(
        database,
        claim,
        "w",
        [
            ProgressUpdate(stage="train", total_steps=8),
            EventUpdate("log", {"value": math.inf, "text": "a\x00b"}),
            MetricUpdate(step=1, loss=2.0, learning_rate=1e-4),
            MetricUpdate(step=1, eval_loss=1.5, eval_accuracy=0.25),
            EventUpdate("log"),
            ProgressUpdate(step=2, eta_seconds=3.5, trained_tokens=40),
        ],
    )
    jobs.record(
        database,
        claim,
        "w",
        [
            MetricUpdate(step=1, grad_norm=0.5, accuracy=0.75, memory_bytes=3 * 2**32),
            MetricUpdate(step=2, loss=math.nan),
        ],
    )
    jobs.record(database, claim, "w", [])
    with database.session() as session:
        events = jobs.events(session, LOCAL, job.id, after=4)
        metrics = jobs.metrics(session, LOCAL, job.id)
    assert [event.id for event in events.data] == [5, 6]
    assert events.data[0].data == {"value": None, "text": "a\x00b"}
    first, second = metrics.data
    assert (first.loss, first.eval_loss, first.grad_norm) == (2.0, 1.5, 0.5)
    assert (first.learning_rate, first.attempt) == (1e-4, 2)
    assert (first.accuracy, first.eval_accuracy) == (0.75, 0.25)
    assert first.memory_bytes == 3 * 2**32
    assert (second.step, second.loss) == (2, None)
    progress = _get(database, job.id).progress
    assert (progress.step, progress.total_steps, progress.percent) == (2, 8, 25.0)
    assert (progress.eta_seconds, progress.trained_tokens) == (3.5, 40)


def test_events_written_at_the_same_time_keep_their_numbers_gapless(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")

    def write(number: int) -> None:
        for _ in range(5):
            jobs.record(database, claim, "w", [EventUpdate("log"), EventUpdate("log")])
            jobs.heartbeat(database, claim, "w", 30)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    numbers = [number for number, _ in _events(database, job.id)]
    assert numbers == list(range(1, 4 + 40 + 1))


def test_pages_of_events_and_metrics_meet(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    updates = [MetricUpdate(step=step, loss=float(step)) for step in range(7)]
    jobs.record(database, claim, "w", updates)
    with database.session() as session:
        steps, cursor = [], None
        while True:
            page = jobs.metrics(session, LOCAL, job.id, cursor=cursor, limit=3)
            steps += [metric.step for metric in page.data]
            if (cursor := page.next_cursor) is None:
                break
        first = jobs.events(session, LOCAL, job.id, limit=2)
        assert first.next_cursor == "2"
        rest = jobs.events(session, LOCAL, job.id, after=int(first.next_cursor))
        assert jobs.events(session, LOCAL, job.id, after=10**12).data == []
        assert jobs.metrics(session, LOCAL, job.id, attempt=1).data == []
    assert steps == list(range(7))
    assert [event.id for event in rest.data] == [3, 4]
    assert rest.next_cursor is None


def test_a_released_job_waits_again_and_is_not_counted_as_lost(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    for _ in range(4):
        jobs.release(database, must_claim(database, "w"), "w")
    assert _get(database, job.id).status == "queued"
    must_claim(database, "w", lease_seconds=-1)
    jobs.sweep(database, "w", 30, max_attempts=2)
    assert _get(database, job.id).status == "queued"


def test_a_failure_is_kept_with_its_details(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    claim = must_claim(database, "w", "validate")
    error = {"kind": "InvalidInput", "code": "invalid_dataset", "message": "bad", "line": 3}
    jobs.fail(database, claim, "w", error)
    failed = _get(database, job.id)
    assert failed.status == "failed"
    assert failed.error == {"code": "invalid_dataset", "message": "bad", "line": 3}
    assert jobs.claim(database, worker_id="w", stage="validate", lease_seconds=1) is None


def test_a_cancel_request_reaches_the_worker(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = queue_job(database, store, settings)
    claim = must_claim(database, "w")
    with database.session(write=True) as session:
        assert jobs.cancel(session, LOCAL, job.id).stop_requested == "cancel"
    assert jobs.heartbeat(database, claim, "w", 30) == "cancel"
    jobs.cancelled(database, claim, "w")
    assert _get(database, job.id).status == "cancelled"


@pytest.mark.parametrize("way", ["release", "validated", "sweep"])
def test_a_cancelled_job_does_not_wait_again(
    database: Database, store: LocalStore, settings: Settings, way: str
) -> None:
    job = submit(database, store, settings)
    claim = must_claim(database, "w", "validate", lease_seconds=-1 if way == "sweep" else 30)
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
    if way == "release":
        jobs.release(database, claim, "w")
    elif way == "validated":
        jobs.validated(database, claim, "w", {})
    else:
        assert jobs.sweep(database, "w", 30, max_attempts=3) == 1
    assert _get(database, job.id).status == "cancelled"
    for stage in ("validate", "train"):
        assert jobs.claim(database, worker_id="w", stage=stage, lease_seconds=1) is None


def test_the_sweep_requeues_lost_jobs_until_they_are_exhausted(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    healthy = queue_job_beside(database, store, settings)
    must_claim(database, "light", "validate", lease_seconds=-1)
    assert jobs.sweep(database, "s", 30, max_attempts=2) == 1
    assert _get(database, job.id).status == "validating"
    check = must_claim(database, "light", "validate")
    jobs.validated(database, check, "light", {})
    must_claim(database, "w", lease_seconds=-1)
    assert jobs.sweep(database, "s", 30, max_attempts=2) == 1
    failed = _get(database, job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "attempts_exhausted"
    assert jobs.sweep(database, "s", 30, max_attempts=2) == 0
    assert _get(database, healthy.job_id).status == "running"
    assert [kind for _, kind in _events(database, job.id)].count("requeued") == 1


def queue_job_beside(database: Database, store: LocalStore, settings: Settings) -> Claim:
    """Return the claim of a younger, more urgent job that stays healthy throughout."""
    submit(database, store, settings, priority=100)
    check = must_claim(database, "other", "validate")
    jobs.validated(database, check, "other", {})
    return must_claim(database, "other")


def test_one_process_at_a_time_sweeps(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    assert jobs.sweep(database, "first", 30, max_attempts=3) == 0
    submit(database, store, settings)
    must_claim(database, "w", "validate", lease_seconds=-1)
    assert jobs.sweep(database, "second", 30, max_attempts=3) == 0, "the first has the duty"
    assert jobs.sweep(database, "first", -1, max_attempts=3) == 1
    must_claim(database, "w", "validate", lease_seconds=-1)
    assert jobs.sweep(database, "second", 30, max_attempts=3) == 1, "the duty has expired"


def test_a_job_without_its_inputs_fails_instead_of_blocking_the_queue(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    broken = queue_job(database, store, settings)
    add_base_model(database, "other", digest="c" * 64)
    fine = queue_job(database, store, settings, base_model="other")
    with database.session(write=True) as session:
        session.execute(delete(BaseModel).where(BaseModel.name == "tiny"))
    assert must_claim(database, "w").job_id == fine.id
    failed = _get(database, broken.id)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "input_missing")


def test_workers_come_and_go(database: Database) -> None:
    jobs.register_worker(database, "a", "train", "host", 1, None)
    jobs.register_worker(database, "a", "train", "host", 1, "job-1")
    jobs.register_worker(database, "b", "light", "host", 2, None)
    with database.session() as session:
        workers = jobs.list_workers(session)
    assert [(worker.id, worker.job_id) for worker in workers] == [("a", "job-1"), ("b", None)]
    assert all(0 <= worker.seconds_since_heartbeat < 60 for worker in workers)
    jobs.forget_worker(database, "a")
    with database.session() as session:
        assert [worker.id for worker in jobs.list_workers(session)] == ["b"]

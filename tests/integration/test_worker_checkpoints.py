from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from core import jobs
from core.db.models import Job, JobCheckpoint
from core.errors import Unavailable
from core.principal import LOCAL
from tests.support.polling import wait_until
from tests.support.worker_jobs import JobBench
from worker.checkpoints import archive


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[JobBench]:
    opened = JobBench(tmp_path / "data")
    yield opened
    opened.close()


def test_a_crashed_job_goes_on_from_its_newest_checkpoint(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("train_and_crash_once")
    job = bench.wait_for(job_id, "succeeded", 30)
    (resumed,) = bench.events(job_id, "resumed")
    assert resumed == {"step": 10, "from_attempt": job.attempt - 1}
    assert _steps_by_attempt(bench, job_id) == {
        step: job.attempt - 1 if step <= 10 else job.attempt for step in range(1, 41)
    }
    assert job.progress.step == 40


def test_only_the_newest_checkpoints_and_their_bytes_are_kept(bench: JobBench) -> None:
    job_id = bench.submit(training={"save_total_limit": 2})
    bench.runner("train_in_steps")
    bench.wait_for(job_id, "succeeded", 30)
    kept = _checkpoints(bench, job_id)
    assert [row.step for row in kept] == [40, 35]
    blobs = {path.name for path in (bench.settings.root / "blobs").iterdir()}
    with bench.database.session() as session:
        rows = session.scalars(select(Job)).one()
    assert {row.sha256 for row in kept} < blobs
    assert len(blobs) == 3, rows  # two checkpoints and the data set


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_skipped_and_reported(bench: JobBench, damage: str) -> None:
    job_id = bench.submit()
    first = bench.runner("train_in_steps", grace_seconds=2)
    wait_until(lambda: len(_checkpoints(bench, job_id)) == 2, 20, "no checkpoints")
    first.stop()
    assert first.join(10)
    newest, older = _checkpoints(bench, job_id)
    blob = bench.settings.root / "blobs" / newest.sha256
    content = blob.read_bytes()
    match damage:
        case "truncate":
            blob.write_bytes(content[:-10_000])
        case "alter":
            blob.write_bytes(b"x" + content[1:])
        case "remove":
            blob.unlink()
    bench.runner("train_in_steps")
    bench.wait_for(job_id, "succeeded", 30)
    (skipped,) = bench.events(job_id, "checkpoint_skipped")
    assert skipped["step"] == newest.step
    assert bench.events(job_id, "resumed")[-1]["step"] == older.step
    with bench.database.session() as session:
        again = session.get(JobCheckpoint, (job_id, newest.step, newest.attempt))
    assert again is None or again.invalid_reason == skipped["reason"]


def test_a_worker_that_shuts_down_loses_no_logged_step(bench: JobBench) -> None:
    job_id = bench.submit()
    first = bench.runner("train_in_steps")
    wait_until(lambda: bench.job(job_id).progress.step >= 7, 20, "no progress")
    first.stop()
    assert first.join(6)
    job = bench.job(job_id)
    assert job.status == "queued"
    logged = max(_steps_by_attempt(bench, job_id))
    assert _checkpoints(bench, job_id)[0].step == logged
    bench.runner("train_in_steps")
    job = bench.wait_for(job_id, "succeeded", 30)
    assert bench.events(job_id, "resumed") == [{"step": logged, "from_attempt": 2}]
    assert sorted(_steps_by_attempt(bench, job_id)) == list(range(1, 41))


def test_a_paused_job_frees_its_worker_and_goes_on_where_it_was(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("train_in_steps")
    wait_until(lambda: bench.job(job_id).progress.step >= 3, 20, "no progress")
    other_id = bench.submit()
    _set(bench, job_id, stop_requested="pause")
    job = bench.wait_for(job_id, "paused", 5)
    assert job.stop_requested is None
    bench.wait_for(other_id, "succeeded", 30)
    step = _checkpoints(bench, job_id)[0].step
    assert bench.job(job_id).status == "paused"
    _set(bench, job_id, status="queued")
    bench.wait_for(job_id, "succeeded", 30)
    assert bench.events(job_id, "resumed")[0]["step"] == step


def test_a_job_that_takes_too_long_fails_and_can_go_on(bench: JobBench) -> None:
    job_id = bench.submit(resources={"time_limit_seconds": 1})
    bench.runner("train_in_steps")
    job = bench.wait_for(job_id, "failed", 20)
    assert job.error is not None
    assert job.error["code"] == "time_limit_exceeded"
    assert _checkpoints(bench, job_id)[0].step >= 1
    with bench.database.session() as session:
        used = session.scalars(select(Job.used_seconds)).one()
    assert 0.9 < used < 60


def test_running_out_of_memory_goes_down_the_ladder_and_costs_no_attempt(bench: JobBench) -> None:
    job_id = bench.submit(training={"batch_size": 8})
    bench.runner("run_out_of_memory_above_rung_two", max_attempts=1)
    bench.wait_for(job_id, "succeeded", 40)
    rungs = [data["memory_rung"] for data in bench.events(job_id, "requeued")]
    assert rungs == [1, 2]
    with bench.database.session() as session:
        assert session.scalars(select(Job.lost_attempts)).one() == 0


def test_at_the_end_of_the_ladder_the_job_fails(bench: JobBench) -> None:
    job_id = bench.submit(training={"batch_size": 8})
    bench.runner("run_out_of_memory")
    job = bench.wait_for(job_id, "failed", 60)
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert [data["memory_rung"] for data in bench.events(job_id, "requeued")] == [1, 2, 3, 4]


def test_a_checkpoint_of_a_lost_lease_is_not_registered(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("train_in_steps", idle_poll_seconds=60)
    wait_until(lambda: bench.job(job_id).progress.step >= 1, 20, "no progress")
    _set(bench, job_id, attempt=17, worker_id="another")
    wait_until(lambda: bench.work_left() == [], 10, "the runner went on")
    assert {row.attempt for row in _checkpoints(bench, job_id)} <= {2}


def test_a_full_store_costs_the_checkpoint_but_not_the_job(
    bench: JobBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.submit()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_blob = bench.store.write_blob
    monkeypatch.setattr(bench.store, "write_blob", full)
    bench.runner("train_in_steps")
    wait_until(lambda: bench.events(job_id, "checkpoint_failed"), 20, "not reported")
    monkeypatch.setattr(bench.store, "write_blob", write_blob)
    bench.wait_for(job_id, "succeeded", 30)
    assert "No space left" in bench.events(job_id, "checkpoint_failed")[0]["reason"]


@pytest.mark.parametrize("method", ["blob_path", "publish_adapter"])
def test_a_store_that_is_away_is_waited_for(
    bench: JobBench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    job_id = bench.submit()
    working = getattr(bench.store, method)

    def away(*_: object) -> None:
        raise Unavailable("the artifact store is away", code="artifact_store_unavailable")

    monkeypatch.setattr(bench.store, method, away)
    bench.runner("succeed")
    wait_until(lambda: bench.events(job_id, "waiting"), 20, "it does not wait")
    assert bench.job(job_id).status == "running"
    monkeypatch.setattr(bench.store, method, working)
    assert bench.wait_for(job_id, "succeeded", 20).attempt == 2


@pytest.mark.parametrize(("request_", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_waiting_for_the_store_ends_on_request(
    bench: JobBench, monkeypatch: pytest.MonkeyPatch, request_: str, status: str
) -> None:
    job_id = bench.submit()

    def away(*_: object) -> None:
        raise Unavailable("the artifact store is away", code="artifact_store_unavailable")

    monkeypatch.setattr(bench.store, "publish_adapter", away)
    bench.runner("succeed")
    wait_until(lambda: bench.events(job_id, "waiting"), 20, "it does not wait")
    _set(bench, job_id, stop_requested=request_)
    bench.wait_for(job_id, status, 5)


def test_a_full_disk_under_the_trainer_costs_no_attempt(bench: JobBench) -> None:
    job_id = bench.submit()
    bench.runner("fill_the_disk_once", max_attempts=1)
    job = bench.wait_for(job_id, "succeeded", 30)
    assert job.attempt == 3
    (waiting,) = bench.events(job_id, "waiting")
    assert waiting["code"] == "storage_full"


def test_an_archive_holds_every_file_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "odd").write_bytes(b"x" * 1_000_001)
    (source / "empty").write_bytes(b"")
    packed = tmp_path / "packed.tar"
    packed.write_bytes(b"".join(archive(source)))
    shutil.unpack_archive(packed, tmp_path / "again", "tar", filter="data")
    assert (tmp_path / "again" / "a" / "b" / "odd").read_bytes() == b"x" * 1_000_001
    assert (tmp_path / "again" / "empty").read_bytes() == b""


def _checkpoints(bench: JobBench, job_id: str) -> list[JobCheckpoint]:
    with bench.database.session() as session:
        return list(
            session.scalars(
                select(JobCheckpoint)
                .where(JobCheckpoint.job_id == job_id)
                .order_by(JobCheckpoint.step.desc(), JobCheckpoint.attempt.desc())
            )
        )


def _steps_by_attempt(bench: JobBench, job_id: str) -> dict[int, int]:
    with bench.database.session() as session:
        rows = jobs.metrics(session, LOCAL, job_id).data
    assert len({row.step for row in rows}) == len(rows)
    return {row.step: row.attempt for row in rows}


def _set(bench: JobBench, job_id: str, **values: object) -> None:
    with bench.database.session(write=True) as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))

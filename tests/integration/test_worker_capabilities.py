"""A worker takes only what it can run, and tells what it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from core import jobs
from core.db.models import BaseModel
from core.reads import WorkerRead
from tests.support.polling import wait_until
from tests.support.worker_jobs import JobBench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[JobBench]:
    opened = JobBench(tmp_path / "data", worker_memory_bytes=1024**3)
    yield opened
    opened.close()


def worker(bench: JobBench) -> WorkerRead | None:
    with bench.database.session() as session:
        found = jobs.list_workers(session)
    return found[0] if found else None


def wait_for_warm(bench: JobBench, base_model: str | None) -> WorkerRead:
    def is_told() -> bool:
        seen = worker(bench)
        return seen is not None and seen.job_id is None and seen.warm_base == base_model

    wait_until(is_told, 15, lambda: str(worker(bench)))
    found = worker(bench)
    assert found is not None
    return found


def test_a_worker_tells_what_it_has_and_leaves_what_needs_more(bench: JobBench) -> None:
    gpu = bench.submit(resources={"device": "cuda"})
    small = bench.submit()
    bench.runner("succeed", device="cpu")
    bench.wait_for(small, "succeeded")
    told = wait_for_warm(bench, "tiny")
    assert (told.device, told.memory_bytes, told.absent_base_models) == ("cpu", 1024**3, [])
    waiting = bench.job(gpu)
    assert waiting.status == "queued"
    assert waiting.progress.waiting_reason == "no live worker has the device 'cuda'"


def test_a_base_model_is_warm_only_as_long_as_its_child_lives(bench: JobBench) -> None:
    first = bench.submit()
    runner = bench.runner("succeed")
    bench.wait_for(first, "succeeded")
    wait_for_warm(bench, "tiny")
    runner.stop()
    assert runner.join(15)
    assert worker(bench) is None
    failing = bench.submit()
    bench.runner("crash", max_attempts=1)
    bench.wait_for(failing, "failed")
    wait_for_warm(bench, None)


def test_a_job_waits_for_a_machine_with_its_base_model(bench: JobBench, tmp_path: Path) -> None:
    files = tmp_path / "model"
    with bench.database.session(write=True) as session:
        session.execute(update(BaseModel).values(path=str(files)))
    job = bench.submit()
    bench.runner("succeed")
    wait_until(lambda: worker(bench), 15, "the worker does not report itself")
    told = worker(bench)
    assert told is not None
    assert told.absent_base_models == ["tiny"]
    reason = bench.job(job).progress.waiting_reason
    assert reason == "no live worker's machine has the files of the base model 'tiny'"
    files.mkdir()
    bench.wait_for(job, "succeeded")

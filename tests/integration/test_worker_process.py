from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.queue import CeleryQueue
from tests.support.polling import wait_until
from tests.support.processes import is_gone
from tests.support.worker_jobs import JobBench
from tests.support.worker_process import WorkerProcess

Start = Callable[..., tuple[JobBench, WorkerProcess]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers: list[WorkerProcess] = []
    benches: list[JobBench] = []

    def open_both(mode: str, **settings: object) -> tuple[JobBench, WorkerProcess]:
        bench = JobBench(tmp_path / "data", **settings)
        benches.append(bench)
        workers.append(WorkerProcess("train", mode, bench.settings, tmp_path / "cwd"))
        workers[-1].wait_until_ready()
        return bench, workers[-1]

    yield open_both
    for worker in workers:
        worker.close()
    for bench in benches:
        bench.close()


def test_a_wake_up_starts_work_at_once_even_after_the_broker_was_wiped(
    start: Start, tmp_path: Path
) -> None:
    bench, worker = start("succeed", idle_poll_seconds=60)
    queue = CeleryQueue(bench.settings)
    try:
        for wiped in (False, True):
            if wiped:
                # Gone in one step: the worker may write to it while files are deleted.
                (bench.settings.root / "broker").rename(tmp_path / "wiped")
            job_id = bench.submit()
            queue.wake("train")
            queue.wake("train")
            bench.wait_for(job_id, "succeeded", 10)
    finally:
        queue.close()
    code, output = worker.stop()
    assert code == 0, worker.log.read_text()
    assert "imported: []" in output
    assert list((tmp_path / "cwd").iterdir()) == []


def test_jobs_are_done_though_every_message_is_lost(start: Start) -> None:
    bench, _ = start("succeed", idle_poll_seconds=0.5)
    for path in (bench.settings.root / "broker").rglob("*"):
        if path.is_file():
            path.unlink(missing_ok=True)
    bench.wait_for(bench.submit(), "succeeded")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_gives_the_running_job_back_and_ends_the_child(
    start: Start, number: signal.Signals
) -> None:
    bench, worker = start("stop_slowly")
    job_id = bench.submit()
    bench.wait_for_work(job_id)
    child = worker.child()
    code, _ = worker.stop(number)
    assert code == 0
    assert bench.job(job_id).status == "queued"
    assert bench.event_types(job_id)[-1] == "released"
    assert is_gone(child)


def test_a_worker_whose_parent_is_gone_gives_its_job_back_and_ends(start: Start) -> None:
    bench, worker = start("stop_slowly")
    job_id = bench.submit()
    bench.wait_for_work(job_id)
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    worker.process.wait(15)
    assert bench.event_types(job_id)[-1] == "released"


def test_a_killed_workers_child_dies_and_its_job_runs_again(start: Start, tmp_path: Path) -> None:
    bench, worker = start("hang", lease_seconds=1.5)
    job_id = bench.submit()
    bench.wait_for_work(job_id)
    child = worker.child()
    worker.process.kill()
    wait_until(lambda: is_gone(child), 5, "the child outlived its worker")
    bench.runner("succeed")
    job = bench.wait_for(job_id, "succeeded", 15)
    assert job.attempt == 3  # validated, killed, done
    assert "requeued" in bench.event_types(job_id)
    wait_until(lambda: bench.work_left() == [], 5, lambda: str(bench.work_left()))


@pytest.mark.redis
def test_a_wake_up_through_redis_starts_work_at_once(start: Start, redis_url: str) -> None:
    bench, worker = start("succeed", idle_poll_seconds=60, broker_url=redis_url)
    queue = CeleryQueue(bench.settings)
    try:
        job_id = bench.submit()
        queue.wake("train")
        bench.wait_for(job_id, "succeeded", 10)
    finally:
        queue.close()
    assert not (bench.settings.root / "broker").exists()
    assert worker.stop()[0] == 0

"""A real Redis that loses everything, goes away and fills up under real workers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from core.config import Settings
from core.queue import MAX_WAITING_WAKE_UPS, QUEUES, CeleryQueue
from tests.support.polling import wait_until
from tests.support.reaper import Reaper
from tests.support.servers import Redis
from tests.support.worker_jobs import JobBench
from tests.support.worker_process import WorkerProcess

pytestmark = pytest.mark.redis

# Of whoever sends: how long it waits after a failure.
PAUSE_SECONDS = 0.5


@pytest.fixture
def server() -> Iterator[Redis]:
    reaper = Reaper()
    running = Redis(reaper)
    yield running
    running.close()
    reaper.close()


@pytest.fixture
def bench(server: Redis, tmp_path: Path) -> Iterator[JobBench]:
    opened = JobBench(tmp_path / "data", idle_poll_seconds=120, broker_url=server.url)
    yield opened
    opened.close()


@pytest.fixture
def queue(server: Redis, tmp_path: Path) -> Iterator[CeleryQueue]:
    settings = Settings(data_dir=tmp_path, broker_url=server.url, idle_poll_seconds=PAUSE_SECONDS)
    opened = CeleryQueue(settings)
    yield opened
    opened.close()


@pytest.fixture
def worker(bench: JobBench, tmp_path: Path) -> Iterator[WorkerProcess]:
    running = WorkerProcess("train", "succeed", bench.settings, tmp_path / "cwd")
    running.wait_until_ready()
    yield running
    running.close()


def waiting(server: Redis) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.llen(QUEUES["train"]))


def test_wake_ups_work_within_seconds_of_a_wiped_and_of_a_restarted_broker(
    bench: JobBench, queue: CeleryQueue, server: Redis, worker: WorkerProcess
) -> None:
    def wakes_the_worker() -> None:
        job_id = bench.submit()
        deadline = time.monotonic() + 10
        while bench.job(job_id).status != "succeeded":
            assert time.monotonic() < deadline, worker.log.read_text()[-3000:]
            queue.wake("train")
            time.sleep(PAUSE_SECONDS)

    wakes_the_worker()
    server.flush()
    wakes_the_worker()
    server.stop(signal.SIGKILL)
    queue.wake("train")
    server.start()
    wakes_the_worker()
    assert worker.process.poll() is None
    assert worker.stop()[0] == 0


def test_a_worker_stops_at_once_while_the_broker_is_away(
    server: Redis, worker: WorkerProcess
) -> None:
    server.stop(signal.SIGKILL)
    wait_until(lambda: "onnection" in worker.log.read_text(), 10, "it noticed nothing")
    started = time.monotonic()
    assert worker.stop()[0] == 0
    assert time.monotonic() - started < 10


def test_wake_ups_that_nobody_reads_do_not_pile_up(
    bench: JobBench, queue: CeleryQueue, server: Redis, tmp_path: Path
) -> None:
    for _ in range(3 * MAX_WAITING_WAKE_UPS):
        queue.wake("train")
    assert waiting(server) == MAX_WAITING_WAKE_UPS
    queue.wake("light")
    with redis.Redis.from_url(server.url) as client:
        assert client.llen(QUEUES["light"]) == 1
    # A worker that comes reads them all and finds its one job.
    job_id = bench.submit()
    worker = WorkerProcess("train", "succeed", bench.settings, tmp_path / "cwd")
    try:
        bench.wait_for(job_id, "succeeded", 20)
        wait_until(lambda: waiting(server) == 0, 10, "wake-ups were left")
        assert bench.job(job_id).attempt == 2
    finally:
        worker.close()

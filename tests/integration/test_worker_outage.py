from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.queue import NullQueue
from tests.support.reaper import Reaper
from tests.support.servers import Postgres
from tests.support.worker_jobs import JobBench

LEASE_SECONDS = 1.5


@pytest.fixture
def server() -> Iterator[Postgres]:
    reaper = Reaper()
    running = Postgres(reaper)
    yield running
    running.close()
    reaper.close()


@pytest.mark.postgres
def test_an_outage_longer_than_the_lease_costs_live_workers_no_attempt(
    server: Postgres, tmp_path: Path
) -> None:
    bench = JobBench(tmp_path / "data", database_url=server.url, lease_seconds=LEASE_SECONDS)
    try:
        job_id = bench.submit()
        bench.runner("stop_slowly")
        bench.wait_for_work(job_id)
        # It has nothing to do but to look for leases that have run out.
        bench.light_runner("validate", NullQueue())
        attempt = bench.job(job_id).attempt
        server.stop(signal.SIGINT)
        time.sleep(2 * LEASE_SECONDS)
        server.start()
        time.sleep(4 * LEASE_SECONDS)
        job = bench.job(job_id)
        assert (job.status, job.attempt) == ("running", attempt), bench.event_types(job_id)
    finally:
        bench.close()

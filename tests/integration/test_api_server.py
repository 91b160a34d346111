"""The API as a process of its own: several workers, one count, and a prompt end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.support.api import ROWS, Api, build_api
from tests.support.polling import wait_until

PROGRAM = "import sys; from core.config import Settings; from service.server import run; "
PROGRAM += "sys.exit(run(Settings(), '127.0.0.1', int(sys.argv[1]), int(sys.argv[2])))"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    built = build_api(tmp_path)
    built.database.close()
    return built


@contextmanager
def serving(
    api: Api, workers: int, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = api.settings.root / "api.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(workers)],
            env={**os.environ, **api.settings.environment(), **variables},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx2.TransportError):
            return client.get("/healthz").is_success
        return False

    try:
        wait_until(answers, 30, log.read_text)
        yield process, client
    finally:
        client.close()
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(10)
        if process.stdin:
            process.stdin.close()


def requests_counted(text: str) -> float:
    counted = re.findall(r'_requests_total\{[^}]*route="/jobs"[^}]*\} (\S+)', text)
    return sum(float(value) for value in counted)


def test_several_workers_count_together_and_stop_together(api: Api) -> None:
    with serving(api, workers=2) as (process, client):
        family = psutil.Process(process.pid).children(recursive=True)
        pids: set[int] = set()

        def both_have_served() -> bool:
            # A new connection each time, so that the kernel spreads them over the workers.
            with httpx2.Client(base_url=client.base_url) as fresh:
                assert fresh.get("/jobs").status_code == 200
            directory = api.settings.run_dir / "prometheus"
            pids.update(int(path.stem.split("_")[-1]) for path in directory.glob("counter_*.db"))
            return len(pids) == 2

        calls = 0

        def call() -> bool:
            nonlocal calls
            calls += 1
            return both_have_served()

        wait_until(call, 20, lambda: f"only {pids} served")
        assert requests_counted(client.get("/metrics").text) == calls
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    wait_until(lambda: not any(p.is_running() for p in family), 5, "a worker is left over")


def test_a_stop_ends_live_streams_at_once(api: Api) -> None:
    with serving(api, workers=1) as (process, client):
        job = client.post("/jobs", json={"base_model": "tiny", "rows": ROWS}).json()["id"]
        with client.sse(f"/jobs/{job}/events") as stream:
            events = iter(stream)
            assert next(events).event == "created"
            process.send_signal(signal.SIGTERM)
            assert list(events) == []
        assert process.wait(5) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_api_ends_with_whoever_started_it(api: Api, workers: int) -> None:
    with serving(api, workers, TUNESMITH_LIFELINE="stdin") as (process, _):
        family = psutil.Process(process.pid).children(recursive=True)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)
    wait_until(lambda: not any(p.is_running() for p in family), 10, "a worker is left over")

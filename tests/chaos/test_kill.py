"""SIGKILL of every part in turn while a job runs: the job ends or goes on, no process is left."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest

from tests.support.polling import wait_until
from tests.support.service import RunningService, chat_rows
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.long

LONG_JOB: dict[str, Any] = {
    "base_model": "tiny",
    "rows": chat_rows(16),
    "training": {"max_steps": 250, "learning_rate": 1e-3},
    "evaluation": {"samples": 0},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for all tests: it has to survive them one after the other."""
    root = tmp_path_factory.mktemp("chaos")
    # A long context, so that no answer ends before the test has done what it wants.
    make_tiny_model(root / "tiny", seed=0, max_position_embeddings=8192)
    running = RunningService(
        root / "data",
        {"tiny": root / "tiny"},
        {
            "TUNESMITH_LEASE_SECONDS": "4",
            "TUNESMITH_IDLE_POLL_SECONDS": "1",
            "TUNESMITH_GRACE_SECONDS": "5",
        },
    )
    try:
        yield running
    finally:
        running.client.close()
        running.kill_everything()


def start_job(service: RunningService) -> str:
    job = service.submit(LONG_JOB)
    service.wait_for(job["id"], lambda seen: seen["progress"]["step"] > 5, 90)
    return str(job["id"])


def assert_one_version_that_answers(service: RunningService, job: dict[str, Any]) -> None:
    assert job["status"] == "succeeded", job
    adapter = job["version"]["name"]
    versions = service.client.get(f"/adapters/{adapter}/versions").json()["data"]
    assert [version["version"] for version in versions] == [1]

    def answers() -> bool:
        reply = service.client.post(
            "/generate", params={"adapter": adapter}, json={"prompt": "item", "max_new_tokens": 4}
        )
        assert reply.status_code in {200, 503}, reply.text
        if reply.status_code == 503:
            assert int(reply.headers["retry-after"]) >= 1
            return False
        return bool(reply.json()["adapter"]["digest"] == job["version"]["digest"])

    wait_until(answers, 60, "the adapter does not answer")


def kill(service: RunningService, role: str) -> None:
    before = service.processes()[role]
    before.kill()

    def replaced() -> bool:
        after = service.processes().get(role)
        return after is not None and after.pid != before.pid

    wait_until(replaced, 60, lambda: f"{role} was not replaced\n{service.log.read_text()[-3000:]}")


def test_killed_parts_that_do_not_train_are_replaced_beside_a_running_job(
    service: RunningService,
) -> None:
    job_id = start_job(service)
    for role in ("engine", "api", "light"):
        kill(service, role)
    job = service.finish(job_id, 120)
    assert_one_version_that_answers(service, job)
    assert job["attempt"] == 2  # one to validate, one to train


def test_a_killed_engine_ends_every_stream_with_an_error_and_comes_back(
    service: RunningService, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = 16
    # Open all before the kill, whatever time each takes to get there.
    under_way = threading.Barrier(streams + 1, timeout=60)
    body = {"prompt": "item", "max_new_tokens": 8000, "min_new_tokens": 8000, "stream": True}

    def read_stream(_: int) -> list[tuple[str, str]]:
        events: list[tuple[str, str]] = []
        with (
            httpx2.Client(base_url=service.client.base_url, timeout=60) as client,
            client.stream("POST", "/generate", json=body) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()
            for line in lines:
                if line.startswith("event:"):
                    events.append((line.removeprefix("event: "), next(lines)))
                    if len(events) == 2:
                        under_way.wait()
        return events

    def answers() -> bool:
        reply = service.client.post("/generate", json={"prompt": "item", "max_new_tokens": 4})
        statuses.append(reply.status_code)
        assert reply.status_code in {200, 503}, reply.text
        return reply.status_code == 200

    statuses: list[int] = []
    wait_until(answers, 60, "the engine does not answer")
    engine = service.processes()["engine"]
    with ThreadPoolExecutor(streams) as pool:
        reading = [pool.submit(read_stream, number) for number in range(streams)]
        under_way.wait()
        engine.kill()
        killed = time.monotonic()
        ends = [future.result(60) for future in reading]
    ended = time.monotonic()
    statuses.clear()
    wait_until(answers, 60, "the engine does not come back")
    recovered = time.monotonic()
    with capsys.disabled():
        names = Counter(events[-1][0] for events in ends)
        print(f"\n{streams} streams ended with {dict(names)}: {ends[0][-1][1]}")
        print(
            f"the last one ended {ended - killed:.2f} s after the kill; answers again after "
            f"{recovered - killed:.2f} s, 503 until then: {statuses.count(503)} times"
        )
    for events in ends:
        assert [name for name, _ in events].count("error") == 1
        name, data = events[-1]
        assert name == "error"
        assert "engine_lost" in data
    assert ended - killed < 5


def test_a_killed_trainer_and_a_killed_worker_each_cost_the_job_one_attempt(
    service: RunningService,
) -> None:
    job_id = start_job(service)
    for role in ("trainer", "train"):
        attempt = service.job(job_id)["attempt"]
        kill(service, role)

        def goes_on(job: dict[str, Any], lost: int = attempt) -> bool:
            return bool(job["attempt"] > lost and job["progress"]["step"] > 5)

        service.wait_for(job_id, goes_on, 90)
    job = service.finish(job_id, 120)
    assert_one_version_that_answers(service, job)
    assert job["attempt"] == 4


def test_a_killed_supervisor_takes_everything_along_and_the_job_goes_on_after_a_restart(
    service: RunningService,
) -> None:
    job_id = start_job(service)
    processes = list(service.processes().values())
    assert {"trainer"} <= set(service.processes())
    service.supervisor.kill()
    service.supervisor.wait(10)
    psutil.wait_procs(processes, timeout=20)
    assert [process.cmdline() for process in processes if process.is_running()] == []
    with pytest.raises(httpx2.TransportError):
        service.client.get("/healthz")

    service.start()
    assert_one_version_that_answers(service, service.finish(job_id, 120))
    pids = [process.pid for process in service.processes().values()]
    assert service.stop() == 0
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []

"""The cluster of docker-compose.yml: processes that share nothing but the network.

Two train workers, two engines, a light worker and an API, each with a data directory of its own;
artifacts are in S3. A job is handed over from one worker to the other while it runs, and its
adapter is served by engines that never saw its files.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.compose_cluster import ComposeCluster
from tests.support.polling import wait_until
from tests.support.service import chat_rows
from tests.support.service_client import TERMINAL
from tests.support.tiny_model import make_tiny_model

pytestmark = [pytest.mark.long, pytest.mark.postgres, pytest.mark.redis]

STEPS = 300
JOB: dict[str, Any] = {
    "base_model": "tiny",
    "adapter": "parrot",
    "lora": {"r": 8},
    "training": {"max_steps": STEPS, "learning_rate": 0.005, "seed": 3},
    "evaluation": {"samples": 0},
}
QUESTION = {
    "messages": [{"role": "user", "content": "What is the code of item 3?"}],
    "max_new_tokens": 12,
    "temperature": 0,
}
DOTENV = {
    "TUNESMITH_IDLE_POLL_SECONDS": "1",
    "TUNESMITH_LEASE_SECONDS": "20",
    "TUNESMITH_TRAINER_THREADS": "1",
    "TUNESMITH_ENGINE_THREADS": "1",
    "TUNESMITH_DEVICE": "cpu",
}
GRACE_SECONDS = 20.0
NAMES = ["api-1", "engine-1", "engine-2", "worker-light-1", "worker-train-1", "worker-train-2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeCluster]:
    root = tmp_path_factory.mktemp("cluster")
    make_tiny_model(root / "models" / "tiny", seed=0)
    with ComposeCluster(root / "cluster", DOTENV) as running:
        # In the order of the file: what depends on the migration is started after it.
        running.start("engine", 1)
        running.start("engine", 2)
        running.run("migrate")
        running.run("cli", "models", "add", "tiny", str(root / "models" / "tiny"))
        for service, number in (
            ("api", 1),
            ("worker-light", 1),
            ("worker-train", 1),
            ("worker-train", 2),
        ):
            running.start(service, number)
        yield running


@pytest.fixture(scope="module")
def client(cluster: ComposeCluster) -> Iterator[httpx2.Client]:
    """A client with an operator's key, of a cluster that is ready."""
    key = cluster.run("cli", "keys", "create", "first", "--scope", "admin").strip()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(
        base_url=cluster.url("api-1"), headers=headers, timeout=60, trust_env=False
    ) as http:

        def is_ready() -> bool:
            ended = [name for name, part in cluster.parts.items() if not part.running]
            assert not ended, f"{ended} ended\n{cluster.tails()}"
            try:
                return http.get("/readyz").is_success
            except httpx2.TransportError:
                return False

        wait_until(is_ready, 150, cluster.tails)
        yield http


@pytest.fixture(scope="module")
def finished_job(cluster: ComposeCluster, client: httpx2.Client) -> dict[str, Any]:
    """A job that was handed over half-way, when its worker was told to stop."""
    job_id = client.post("/jobs", json={**JOB, "rows": chat_rows(16)}).json()["id"]
    latest: dict[str, Any] = {}

    def reaches(step: int) -> bool:
        latest.update(client.get(f"/jobs/{job_id}").json())
        assert latest["status"] not in {"failed", "cancelled"}, f"{latest}\n{cluster.tails()}"
        return bool(latest["progress"]["step"] >= step)

    wait_until(lambda: reaches(10), 120, lambda: f"{latest}\n{cluster.tails()}")
    workers = client.get("/workers").json()["data"]
    busy = next(worker for worker in workers if worker["job_id"] == job_id)
    (part,) = [part for part in cluster.parts.values() if part.running and part.pid == busy["pid"]]
    part.send(signal.SIGTERM)
    # Within its grace period, and a moment to write down how it ended.
    assert part.wait(GRACE_SECONDS + 5) == 0, part.tail()

    wait_until(
        lambda: reaches(0) and latest["status"] in TERMINAL,
        180,
        lambda: f"{latest}\n{cluster.tails()}",
    )
    return latest


def test_without_a_key_nobody_gets_in(cluster: ComposeCluster, client: httpx2.Client) -> None:
    assert httpx2.get(cluster.url("api-1") + "/jobs").status_code == 401
    assert client.get("/jobs").status_code == 200


@pytest.mark.parametrize("name", NAMES)
def test_every_part_passes_the_health_check_of_the_file(
    cluster: ComposeCluster, client: httpx2.Client, name: str
) -> None:
    assert cluster.is_healthy(name), cluster.parts[name].tail()


def test_a_stopped_workers_job_goes_on_elsewhere_from_its_checkpoint(
    client: httpx2.Client, finished_job: dict[str, Any]
) -> None:
    assert finished_job["status"] == "succeeded", finished_job
    events = client.get(f"/jobs/{finished_job['id']}/events", params={"limit": 1000}).json()["data"]
    saved = [event for event in events if event["type"] == "checkpoint_saved"]
    (resumed,) = [event for event in events if event["type"] == "resumed"]
    step = resumed["data"]["step"]
    assert 10 <= step < STEPS
    assert step in {event["data"]["step"] for event in saved}

    rows = client.get(f"/jobs/{finished_job['id']}/metrics", params={"limit": 2000}).json()["data"]
    logged = [row for row in rows if row["loss"] is not None]
    # Each step was done once: nothing before the checkpoint again, nothing after it left out.
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    attempts = [(attempt, len(list(of))) for attempt, of in itertools.groupby(
        logged, key=lambda row: row["attempt"]
    )]  # fmt: skip
    assert len(attempts) == 2
    assert attempts[0] == (resumed["data"]["from_attempt"], step)


def test_either_engine_answers_with_an_adapter_that_it_fetched_from_s3(
    cluster: ComposeCluster, client: httpx2.Client, finished_job: dict[str, Any]
) -> None:
    digest = finished_job["version"]["digest"]

    def answer() -> dict[str, Any]:
        reply = client.post("/generate", params={"adapter": "parrot"}, json=QUESTION)
        assert reply.status_code == 200, f"{reply.text}\n{cluster.tails()}"
        assert reply.json()["adapter"]["digest"] == digest
        return dict(reply.json())

    engines = ["engine-1", "engine-2"]
    first = answer()
    (chosen,) = [name for name in engines if holds(cluster.data_dir(name), digest)]
    assert cluster.parts[chosen].stop() == 0
    assert answer()["text"] == first["text"]
    assert all(holds(cluster.data_dir(name), digest) for name in engines)

    base = client.post("/generate", json={**QUESTION, "base_model": "tiny"}).json()
    assert base["adapter"] is None
    assert base["text"] != first["text"]


def holds(directory: Path, digest: str) -> bool:
    """Tell whether an adapter's weights lie somewhere below a directory."""
    return any(digest in str(path) for path in directory.rglob("*.safetensors"))

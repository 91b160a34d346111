"""What jobs cost when there are many: the same calls on a small and on a large database.

Both databases are on one Postgres server with its default durability, and every call goes to one
and then to the other, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psycopg

import migrations
from benchmarks.report import Measurement
from core import auth, jobs
from core.config import Settings
from core.db.repositories import overview
from core.db.session import Database
from core.storage import LocalStore
from tests.support import many_jobs
from tests.support.factories import make_spec
from tests.support.many_jobs import MEASURED_EVERY, PROJECTS, job_id, owner
from tests.support.polling import wait_until
from tests.support.reaper import Reaper
from tests.support.servers import Postgres, free_port

SMALL = 1_000
_CALLS = 400
_WARM_UP_CALLS = 50
_SUBMITTING_SECONDS = 3.0
_CLIENTS = 4
_PERCENTILES = (50, 95, 99)
# The large database has more jobs waiting than a project may by default.
_QUEUE_QUOTA = 1_000_000


def measure(large: int, rounds: int) -> list[Measurement]:
    """Time every call in both databases.

    Args:
        large: Jobs in the large one, a multiple of 1000; it has ten times as many measurements.
        rounds: Of 400 calls of each kind in each database.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reaper = Reaper()
        stack.callback(reaper.close)
        server = Postgres(reaper)
        stack.callback(server.close)
        print(f"{_version(server)}; load average {os.getloadavg()[0]:.1f}", flush=True)
        sides = [
            stack.enter_context(_side(server, size, directory / str(size)))
            for size in (SMALL, large)
        ]
        return [
            *_time_calls(sides, rounds),
            *_time_submissions(sides, rounds),
        ]


@dataclass(frozen=True)
class _Side:
    """One of the two databases, and an API process on it.

    Attributes:
        size: How many jobs it began with.
        client: Sends to the API as the owner of job 0.
    """

    size: int
    database: Database
    settings: Settings
    store: LocalStore
    client: httpx2.Client

    def some_job(self, chance: random.Random) -> int:
        return chance.randrange(self.size)


def _version(server: Postgres) -> str:
    with _administrator(server) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    return f"Postgres {row[0] if row else 'of unknown version'}"


def _administrator(server: Postgres) -> psycopg.Connection:
    return psycopg.connect(
        f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres", autocommit=True
    )


@contextmanager
def _side(server: Postgres, size: int, data_dir: Path) -> Iterator[_Side]:
    name = f"jobs_{size}"
    with _administrator(server) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    settings = Settings(
        data_dir=data_dir,
        database_url=server.url.rpartition("/")[0] + f"/{name}",
        auth="keys",
        quota_queued_jobs=_QUEUE_QUOTA,
    )
    migrations.upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    started = time.monotonic()
    many_jobs.fill(database, size)
    print(f"{size:,} jobs stored in {time.monotonic() - started:.0f} s", flush=True)
    with database.session(write=True) as session:
        _, key = auth.create_key(session, owner(0).project_id, "benchmark", ["train"])
    with _running_api(settings, data_dir) as url:
        headers = {"Authorization": f"Bearer {key}"}
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
            yield _Side(size, database, settings, LocalStore(settings.root), client)
    database.close()


@contextmanager
def _running_api(settings: Settings, data_dir: Path) -> Iterator[str]:
    port = free_port()
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "api.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "api", "--port", str(port)],
            env=settings.environment(),
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (data_dir / "api.log").read_text()
        try:
            return httpx2.get(f"{url}/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_until(answers, 30, "the API does not answer")
        yield url
    finally:
        process.terminate()
        process.wait(30)


Call = Callable[[_Side, random.Random], float]
"""Does something and returns how many seconds it took."""


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _read_status(side: _Side, chance: random.Random) -> float:
    number = side.some_job(chance)

    def act() -> None:
        with side.database.session() as session:
            jobs.get(session, owner(number), job_id(number), settings=side.settings)

    return _timed(act)


def _read_status_over_http(side: _Side, chance: random.Random) -> float:
    number = side.some_job(chance) // PROJECTS * PROJECTS
    return _timed(lambda: side.client.get(f"/jobs/{job_id(number)}").raise_for_status())


def _list_page(side: _Side, chance: random.Random) -> float:
    chosen = chance.choice(
        ({}, {"status": "failed"}, {"status": "succeeded"}, {"status": "queued"})
    )
    principal = owner(chance.randrange(PROJECTS))

    def act() -> None:
        with side.database.session() as session:
            jobs.list_jobs(session, principal, limit=20, **chosen)

    return _timed(act)


def _read_metrics(side: _Side, chance: random.Random) -> float:
    number = side.some_job(chance) // MEASURED_EVERY * MEASURED_EVERY

    def act() -> None:
        with side.database.session() as session:
            assert jobs.metrics(session, owner(number), job_id(number), limit=50).data

    return _timed(act)


def _claim(side: _Side, _: random.Random) -> float:
    claimed: list[jobs.Claim | None] = []

    def act() -> None:
        claimed.append(
            jobs.claim(side.database, worker_id="benchmark", stage="train", lease_seconds=30)
        )

    seconds = _timed(act)
    assert claimed[0] is not None
    jobs.release(side.database, claimed[0], "benchmark")
    return seconds


def _scrape(side: _Side, _: random.Random) -> float:
    def act() -> None:
        with side.database.session() as session:
            overview.read_totals(session, worker_silence_seconds=30)

    return _timed(act)


_CALLS_BY_NAME: dict[str, Call] = {
    "job status": _read_status,
    "job status over HTTP": _read_status_over_http,
    "list of 20 jobs": _list_page,
    "50 measurements": _read_metrics,
    "claim": _claim,
    "Prometheus' totals": _scrape,
}


def _time_calls(sides: list[_Side], rounds: int) -> list[Measurement]:
    chance = random.Random(7)
    for call in _CALLS_BY_NAME.values():
        for _ in range(_WARM_UP_CALLS):
            for side in sides:
                call(side, chance)
    small, large = sides
    samples: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for _ in range(rounds):
        for name, call in _CALLS_BY_NAME.items():
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(_CALLS):
                for side, its in zip((large, small), times, strict=True):
                    its.append(call(side, chance) * 1000)
            for percent in _PERCENTILES:
                found = samples.setdefault((name, percent), ([], []))
                for its, kept in zip(times, found, strict=True):
                    kept.append(statistics.quantiles(its, n=100)[percent - 1])
    return [
        Measurement(f"{name}, p{percent}", "ms", ours, peer, f"{small.size:,} jobs")
        for (name, percent), (ours, peer) in samples.items()
    ]


def _time_submissions(sides: list[_Side], rounds: int) -> list[Measurement]:
    small, large = sides
    found: list[Measurement] = []
    for name, submit, clients in (
        ("submissions", _submit, 1),
        (f"submissions over HTTP, {_CLIENTS} clients", _submit_over_http, _CLIENTS),
    ):
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for side, its in zip((large, small), rates, strict=True):
                its.append(_rate(side, submit, clients))
        found.append(Measurement(name, "jobs/s", *rates, f"{small.size:,} jobs"))
    return found


def _rate(side: _Side, submit: Callable[[_Side], None], clients: int) -> float:
    """Return how many jobs per second all clients together submit."""
    deadline = time.perf_counter() + _SUBMITTING_SECONDS

    def keep_submitting(_: int) -> int:
        done = 0
        while time.perf_counter() < deadline:
            submit(side)
            done += 1
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = sum(pool.map(keep_submitting, range(clients)))
    return done / (time.perf_counter() - started)


def _submit(side: _Side) -> None:
    spec = make_spec(dataset="file-0")
    with side.database.session(write=True) as session:
        jobs.submit(session, owner(0), spec, settings=side.settings, store=side.store)


def _submit_over_http(side: _Side) -> None:
    body = {"base_model": "tiny", "dataset": "file-0"}
    side.client.post("/jobs", json=body).raise_for_status()

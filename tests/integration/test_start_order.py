"""Parts that start before the database: they wait, say what for, and stop when told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import migrations
from core import auth
from core.config import Settings
from core.db.session import Database
from service.serving import find_port
from tests.support.databases import PostgresServer
from tests.support.polling import wait_until

Start = Callable[..., "Waiting"]


class Waiting:
    """A command of the service, with its log in a file."""

    def __init__(self, settings: Settings, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *arguments],
                env={**os.environ, **settings.environment()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of its log."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the first line with this event, once it is there."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.events() if line["event"] == event]

        wait_until(found, 30, self.log.read_text)
        return found()[0]


@pytest.fixture
def empty_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.empty_database() as url:
        yield url


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Waiting] = []

    def run(settings: Settings, *arguments: str) -> Waiting:
        started.append(Waiting(settings, tmp_path / f"{len(started)}.log", *arguments))
        return started[-1]

    yield run
    for part in started:
        part.process.kill()
        part.process.wait()


@pytest.mark.postgres
def test_a_worker_waits_for_its_schema_and_then_works(
    start: Start, tmp_path: Path, empty_url: str
) -> None:
    worker = start(
        Settings(data_dir=tmp_path / "data", database_url=empty_url), "worker", "--queue", "light"
    )
    waiting = worker.wait_for("waiting_for_schema")
    assert waiting["revision"] == "nothing"
    assert waiting["needed"] == migrations.head()
    assert "tunesmith db upgrade" in waiting["hint"]
    migrations.upgrade(empty_url)
    worker.wait_for("waiting_is_over")
    worker.wait_for("worker_started")
    assert len([line for line in worker.events() if line["event"] == "waiting_for_schema"]) == 1
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(20) == 0, worker.log.read_text()[-3000:]


def test_a_worker_that_waits_for_its_database_can_be_stopped(start: Start, tmp_path: Path) -> None:
    url = f"postgresql://tunesmith:hidden@127.0.0.1:{find_port('127.0.0.1', 0)}/none"
    worker = start(Settings(data_dir=tmp_path, database_url=url), "worker", "--queue", "train")
    assert "refused" in worker.wait_for("waiting_for_database")["reason"].lower()
    assert "hidden" not in worker.log.read_text()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(20) == 0, worker.log.read_text()[-3000:]


@pytest.mark.postgres
def test_an_exposed_api_waits_for_the_schema_and_then_insists_on_a_key(
    start: Start, tmp_path: Path, empty_url: str
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=empty_url, auth="keys")
    api = start(settings, "api", "--host", "0.0.0.0", "--port", "1")
    api.wait_for("waiting_for_schema")
    migrations.upgrade(empty_url)
    assert api.process.wait(20) == 1
    assert "exposed_without_keys" in api.log.read_text()
    assert "tunesmith keys create" in api.log.read_text()


@pytest.mark.postgres
def test_a_later_versions_schema_is_waited_for_by_nobody(
    start: Start, tmp_path: Path, empty_url: str
) -> None:
    """While a cluster is upgraded, parts of the old version meet the schema of the new one."""
    migrations.upgrade(empty_url)
    database = Database(empty_url)
    with database.session(write=True) as session:
        session.connection().exec_driver_sql(
            "UPDATE alembic_version SET version_num = 'of_a_later_version'"
        )
        auth.create_key(session, "default", "first", ["read"])
    database.close()
    settings = Settings(data_dir=tmp_path / "data", database_url=empty_url)
    worker = start(settings, "worker", "--queue", "light")
    worker.wait_for("worker_started")
    assert not [line for line in worker.events() if line["event"].startswith("waiting")]
    migrations.upgrade(empty_url)
    assert migrations.current(empty_url) == "of_a_later_version"
    upgrade = start(settings, "db", "upgrade")
    assert upgrade.process.wait(20) == 0, upgrade.log.read_text()


def test_an_engine_on_tcp_insists_on_a_secret(start: Start, tmp_path: Path) -> None:
    engine = start(Settings(data_dir=tmp_path), "engine", "--listen", "http://127.0.0.1:1")
    assert engine.process.wait(30) == 1
    refusal = engine.wait_for("engine_cannot_listen")
    assert "without a shared secret" in refusal["message"]
    assert "TUNESMITH_ENGINE_SECRET" in refusal["hint"]

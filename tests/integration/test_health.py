"""The probes that containers and service managers use, against real parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from core import jobs
from core.config import Settings
from core.db.session import Database
from core.errors import Unavailable
from core.inference.engine import BaseModelRef, Done, EngineStatus, GenerateRequest
from engine.channels import Channels
from engine.server import create_app
from service.engine_client import RemoteEngine
from service.engine_pool import EnginePool
from service.serving import find_port
from tests.support.command_line import live_api, succeed, tunesmith
from tests.support.fake_engine import FakeEngine
from tests.support.polling import wait_until

SECRET = "a-shared-secret"


class LoadingEngine(FakeEngine):
    """An engine that has not loaded its libraries yet."""

    async def status(self) -> EngineStatus:
        return (await super().status()).model_copy(update={"ready": False})


@contextlib.contextmanager
def engine_on_tcp(engine: FakeEngine) -> Iterator[str]:
    port = find_port("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(engine, SECRET, Channels()), port=port, log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 20, "the engine did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_the_api_is_well_as_soon_as_it_answers_and_ready_with_all_parts(
    sqlite_database: Database, settings: Settings
) -> None:
    engine = FakeEngine()
    with live_api(settings, engine) as url:
        port = url.rsplit(":", 1)[1]
        assert "answers" in succeed("healthy", "api", "--port", port, "--json").json["detail"]
        engine.unavailable = Unavailable("the engine cannot be reached", code="engine_unavailable")
        refused = tunesmith("healthy", "api", "--port", port, "--ready")
        assert refused.code == 1
        assert "engine: the engine cannot be reached" in refused.stderr
        assert "train_worker: no worker serves" in refused.stderr
        engine.unavailable = None
        for queue in ("train", "light"):
            jobs.register_worker(sqlite_database, queue, queue, "host", 1, None)
        assert succeed("healthy", "api", "--port", port, "--ready").stdout.startswith("ready")


def test_an_api_that_is_not_there_or_something_else_is_not_well() -> None:
    gone = tunesmith("healthy", "api", "--port", find_port("127.0.0.1", 0))
    assert gone.code == 1
    assert "api_unavailable" in gone.stderr
    with engine_on_tcp(FakeEngine()) as address:
        other = tunesmith("healthy", "api", "--port", address.rsplit(":", 1)[1])
    assert other.code == 1
    assert "api_unavailable" in other.stderr


def test_an_engine_is_well_once_it_takes_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_ENGINE_SECRET", SECRET)
    with engine_on_tcp(FakeEngine()) as address:
        assert "ready" in succeed("healthy", "engine", "--address", address).stdout
        monkeypatch.setenv("ENGINE_URLS", address)
        assert "ready" in succeed("healthy", "engine").stdout
        monkeypatch.setenv("TUNESMITH_ENGINE_SECRET", "another")
        refused = tunesmith("healthy", "engine")
    assert refused.code == 1
    assert "engine_secret_wrong" in refused.stderr
    with engine_on_tcp(LoadingEngine()) as address:
        monkeypatch.setenv("TUNESMITH_ENGINE_SECRET", SECRET)
        loading = tunesmith("healthy", "engine", "--address", address)
    assert loading.code == 1
    assert "engine_loading" in loading.stderr
    gone = tunesmith("healthy", "engine", "--address", address)
    assert gone.code == 1
    assert "engine_unavailable" in gone.stderr


def test_a_worker_is_well_while_its_reports_are_fresh(
    monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    monkeypatch.setenv("DATABASE_URL", str(database.url))
    here, pid = socket.gethostname(), os.getpid()
    jobs.register_worker(database, "mine", "train", here, pid, None)
    jobs.register_worker(database, "foreign", "light", "elsewhere", 7, None)

    succeed("healthy", "worker")
    assert "mine" in succeed("healthy", "worker", "--queue", "train", "--pid", pid).stdout
    for arguments in (["--queue", "light"], ["--pid", "7"]):
        refused = tunesmith("healthy", "worker", *arguments)
        assert refused.code == 1
        assert "worker_silent" in refused.stderr

    monkeypatch.setenv("TUNESMITH_LEASE_SECONDS", "0.001")
    monkeypatch.setenv("TUNESMITH_IDLE_POLL_SECONDS", "0.001")
    stale = tunesmith("healthy", "worker")
    assert stale.code == 1
    assert "worker_silent" in stale.stderr


def test_a_worker_is_not_well_where_the_database_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'none.db'}")
    refused = tunesmith("healthy", "worker")
    assert refused.code == 1
    assert "database_unavailable" in refused.stderr


def test_another_secret_is_no_fault_of_the_client_and_another_engine_answers() -> None:
    async def scenario(old: str, new: str) -> None:
        pool = EnginePool(
            {old: RemoteEngine(old, secret="former"), new: RemoteEngine(new, secret=SECRET)}
        )
        try:
            with pytest.raises(Unavailable) as caught:
                await pool.engines[old].status()
            assert caught.value.code == "engine_secret_wrong"
            for number in range(8):
                request = GenerateRequest(
                    request_id=f"gen-{number}",
                    project_id="p",
                    base_model=BaseModelRef(name="m", digest="0" * 64, path="/nowhere"),
                    prompt="Hi",
                )
                events = [event async for event in await pool.generate(request)]
                assert isinstance(events[-1], Done)
        finally:
            await pool.aclose()

    with engine_on_tcp(FakeEngine()) as old, engine_on_tcp(FakeEngine()) as new:
        asyncio.run(scenario(old, new))

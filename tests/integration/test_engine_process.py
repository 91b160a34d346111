"""The engine process keeps the contract over a real socket, and looks after that socket."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Iterator
from contextlib import aclosing, closing, suppress
from pathlib import Path

import httpx2
import pytest

from core.errors import Unavailable
from core.inference.engine import Done, Engine, Failed
from tests.support.engine_contract import EngineContract
from tests.support.engine_limits import MAX_ADAPTERS, MAX_WAITING
from tests.support.engine_process import EngineProcess
from tests.support.engine_world import World, collect, make_request


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def harness(world: World) -> Iterator[EngineProcess]:
    process = EngineProcess(
        world.data_dir,
        engine_max_adapters=MAX_ADAPTERS,
        engine_max_waiting=MAX_WAITING,
        engine_precision="float32",
    )
    try:
        yield process.wait_until_ready()
        assert process.stop() == 0, process.log.read_text()
    finally:
        process.kill()


class TestRemoteEngine(EngineContract):
    def test_the_socket_is_for_its_owner_alone(self, harness: EngineProcess) -> None:
        path = harness.settings.engine_socket
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_a_second_engine_leaves_the_first_one_its_socket(
        self, harness: EngineProcess, tmp_path: Path
    ) -> None:
        second = EngineProcess(tmp_path / "data", listen=harness.address)
        try:
            assert second.process.wait(30) == 1
            assert "engine_cannot_listen" in second.log.read_text()
        finally:
            second.kill()
        assert harness.status() is not None

    @pytest.mark.parametrize("left", ["the request", "the events"])
    def test_a_client_that_breaks_off_frees_the_engine(
        self, harness: EngineProcess, world: World, left: str
    ) -> None:
        long = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)
        transport = httpx2.AsyncHTTPTransport(uds=str(harness.settings.engine_socket))

        async def ask_and_leave() -> None:
            async with httpx2.AsyncClient(transport=transport, base_url="http://engine") as client:
                async with client.stream("GET", "/events/mine") as events:
                    asking = asyncio.create_task(
                        client.post("/events/mine/requests/3", content=long.model_dump_json())
                    )
                    line = json.loads(await anext(events.aiter_lines()))
                    assert (line[0][0], line[0][1]["type"]) == (3, "started")
                    if left == "the request":
                        asking.cancel()
                with suppress(asyncio.CancelledError):
                    assert (await asking).status_code == 499

        asyncio.run(ask_and_leave())
        short = make_request(world.base, max_new_tokens=2)
        answer = harness.run(lambda engine: collect(engine, short))
        assert answer.done is not None
        # All rows were taken; 480 steps of 16 rows take longer than one.
        assert answer.done.timings.queue_ms < 500

    def test_a_request_without_a_way_back_is_refused(
        self, harness: EngineProcess, world: World
    ) -> None:
        transport = httpx2.HTTPTransport(uds=str(harness.settings.engine_socket))
        request = make_request(world.base).model_dump_json()
        with httpx2.Client(transport=transport, base_url="http://engine") as client:
            refused = client.post("/events/nobody/requests/1", content=request)
            assert refused.status_code == 503
            assert refused.json()["code"] == "engine_unavailable"

    def test_a_stop_lets_running_answers_end(self, world: World, tmp_path: Path) -> None:
        process = EngineProcess(tmp_path / "data").wait_until_ready()
        request = make_request(world.base, max_new_tokens=480, min_new_tokens=480)

        async def scenario(engine: Engine) -> None:
            async with aclosing(await engine.generate(request)) as stream:
                await anext(stream)
                process.process.terminate()
                events = [event async for event in stream]
            assert isinstance(events[-1], Done)
            assert events[-1].completion_tokens == 480

        try:
            process.run(scenario)
            assert process.process.wait(30) == 0
        finally:
            process.kill()

    def test_a_request_that_is_no_request_is_refused(self, harness: EngineProcess) -> None:
        transport = httpx2.HTTPTransport(uds=str(harness.settings.engine_socket))
        with httpx2.Client(transport=transport, base_url="http://engine") as client:
            refused = client.post("/events/mine/requests/1", json={"request_id": 1})
            assert refused.status_code == 422
            assert refused.json()["code"] == "invalid_engine_request"


def test_it_listens_before_it_is_ready_and_survives_a_stale_socket(tmp_path: Path) -> None:
    process = EngineProcess(tmp_path / "data")
    try:
        assert not process.wait_until_listening().ready
        process.kill()
        assert process.settings.engine_socket.exists(), "nothing is left to trip over"
        process = EngineProcess(tmp_path / "data")
        assert not process.wait_until_listening().ready
    finally:
        process.kill()


@pytest.fixture(scope="module")
def tcp_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    root = tmp_path_factory.mktemp("tcp")
    process = EngineProcess(root / "data", listen=address, engine_secret="open sesame")
    try:
        yield process.wait_until_ready()
    finally:
        process.kill()


def test_over_tcp_the_secret_is_required(tcp_engine: EngineProcess, world: World) -> None:
    for headers in ({}, {"x-tunesmith-engine-secret": "open"}):
        refused = httpx2.get(f"{tcp_engine.address}/status", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["code"] == "engine_secret_wrong"
    request = make_request(world.base, max_new_tokens=3)
    answer = tcp_engine.run(lambda engine: collect(engine, request))
    assert answer.finished[0].completion_tokens == 3


def test_an_engine_that_dies_fails_the_stream_and_then_every_request(
    tcp_engine: EngineProcess, world: World
) -> None:
    request = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)

    async def scenario(engine: Engine) -> None:
        async with aclosing(await engine.generate(request)) as stream:
            await anext(stream)
            await asyncio.to_thread(tcp_engine.kill)
            events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "engine_lost"
        for call in (engine.generate(request), engine.status()):
            with pytest.raises(Unavailable) as gone:
                await call
            assert gone.value.code == "engine_unavailable"

    tcp_engine.run(scenario)

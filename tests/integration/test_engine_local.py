"""What the engine inside this process does when things go wrong; see also test_engine_contract."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from core.errors import Unavailable
from core.inference.engine import AdapterRef, Engine, Failed
from core.inference.lean.model import LeanModel
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from tests.support.engine_harness import LocalHarness
from tests.support.engine_world import World, collect, make_request

T = TypeVar("T")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_a_request_that_fails_half_way_says_so_and_fails_alone(world: World) -> None:
    harness = LocalHarness(world)
    request = make_request(world.base, max_new_tokens=200, min_new_tokens=200)

    async def scenario(engine: Engine) -> None:
        before = (await collect(engine, request)).text
        rows = harness.rows(world.base)
        assert isinstance(rows, LeanModel)
        embedding = rows._decoder.embedding
        kept = embedding.clone()
        stream = await engine.generate(request)
        await anext(stream)
        with torch.no_grad():
            embedding.mul_(float("nan"))
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "logits_not_finite"
        with torch.no_grad():
            embedding.copy_(kept)
        assert (await collect(engine, request)).text == before
        assert (await engine.status()).running == 0

    harness.run(scenario)
    harness.engine.stop()


def test_adapters_that_are_fetched_slowly_hold_nobody_up(world: World) -> None:
    fetching, arrived = threading.Semaphore(0), threading.Event()

    def locate_adapter(digest: str) -> Path:
        fetching.release()
        assert arrived.wait(60)
        return world.locate_adapter(digest)

    engine = LocalEngine(
        lambda: ModelRunner("cpu", threads=1, precision="float32"), locate_adapter
    ).start()
    assert engine.ready.wait(60)

    async def scenario() -> None:
        # As many as are fetched at a time.
        adapters = [AdapterRef(digest=digest * 64) for digest in "0123"]
        waiting = [
            asyncio.ensure_future(collect(engine, make_request(world.base, adapter)))
            for adapter in [*adapters, world.a]
        ]
        for _ in adapters:
            assert await asyncio.to_thread(fetching.acquire, timeout=60)
        answer = await collect(engine, make_request(world.base, max_new_tokens=3))
        assert answer.done is not None
        assert not any(task.done() for task in waiting)
        arrived.set()
        *refused, answer = await asyncio.gather(*waiting, return_exceptions=True)
        assert {error.code for error in refused} == {"adapter_files_missing"}
        assert answer.started.adapter_digest == world.a.digest

    asyncio.run(scenario())
    engine.stop()


def test_a_stopped_engine_fails_what_is_not_done(world: World) -> None:
    harness = LocalHarness(world)
    request = make_request(world.base, max_new_tokens=480, min_new_tokens=480, n=16)

    async def scenario(engine: Engine) -> None:
        stream = await engine.generate(request)
        await asyncio.to_thread(harness.engine.stop)
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "engine_unavailable"
        with pytest.raises(Unavailable):
            await engine.generate(request)
        with pytest.raises(Unavailable):
            await engine.status()

    harness.run(scenario)


def test_an_engine_that_cannot_start_reports_it() -> None:
    crashed: list[bool] = []

    def make_runner() -> ModelRunner:
        raise RuntimeError("no device")

    engine = LocalEngine(make_runner, Path, on_crash=lambda: crashed.append(True)).start()
    engine.stop()
    assert crashed == [True]
    assert not engine.ready.is_set()

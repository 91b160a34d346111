"""The engine inside this process keeps the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
import torch

from core.errors import Unavailable
from core.inference.engine import Engine, Failed
from core.inference.local_engine import LocalEngine
from core.inference.transformers_runner import TransformersRunner
from tests.support.engine_contract import MAX_ADAPTERS, MAX_WAITING, EngineContract
from tests.support.engine_world import World, collect, make_request

T = TypeVar("T")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class LocalHarness:
    def __init__(self, runners: list[TransformersRunner]) -> None:
        def make_runner() -> TransformersRunner:
            runners.append(TransformersRunner("cpu", threads=1))
            return runners[0]

        self.engine = LocalEngine(
            make_runner, max_adapters=MAX_ADAPTERS, max_waiting=MAX_WAITING
        ).start()
        assert self.engine.ready.wait(60)

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        async def main() -> T:
            return await scenario(self.engine)

        return asyncio.run(main())


@pytest.fixture(scope="module")
def runners() -> list[TransformersRunner]:
    return []


@pytest.fixture(scope="module")
def harness(runners: list[TransformersRunner]) -> Iterator[LocalHarness]:
    harness = LocalHarness(runners)
    yield harness
    harness.engine.stop()


class TestLocalEngine(EngineContract):
    def test_the_base_model_is_bit_equal_to_one_that_never_saw_an_adapter(
        self, harness: LocalHarness, world: World, runners: list[TransformersRunner]
    ) -> None:
        from transformers import AutoModelForCausalLM

        for adapter in (world.a, world.b, world.c):
            harness.run(
                lambda engine, adapter=adapter: collect(engine, make_request(world.base, adapter))
            )
        ids = torch.arange(3, 60)[None]
        untouched = AutoModelForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
        base = runners[0].bases[world.base.digest]
        with torch.inference_mode():
            expected = untouched.eval()(input_ids=ids).logits
        # The engine is idle, so this thread may use its model.
        with_adapters = base.forward(None, ids)
        tuned = base.forward(world.c.digest, ids)
        assert torch.equal(with_adapters, expected)
        assert not torch.equal(tuned, expected)
        assert torch.equal(base.forward(None, ids), expected)

        async def forget(engine: Engine) -> None:
            for adapter in (await engine.status()).adapters:
                assert await engine.unload(adapter.digest)

        harness.run(forget)
        assert torch.equal(base.forward(None, ids), expected)
        assert not any(base.applied_modules(a.digest) for a in (world.a, world.b, world.c))


def test_a_request_that_fails_half_way_says_so_and_fails_alone(world: World) -> None:
    runners: list[TransformersRunner] = []
    harness = LocalHarness(runners)
    request = make_request(world.base, max_new_tokens=200, min_new_tokens=200)

    async def scenario(engine: Engine) -> None:
        before = (await collect(engine, request)).text
        norm = runners[0].bases[world.base.digest].model.model.norm.weight
        stream = await engine.generate(request)
        await anext(stream)
        with torch.no_grad():
            norm.mul_(float("nan"))
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "logits_not_finite"
        with torch.no_grad():
            norm.fill_(1.0)
        assert (await collect(engine, request)).text == before
        assert (await engine.status()).running == 0

    harness.run(scenario)
    harness.engine.stop()


def test_a_stopped_engine_fails_what_is_not_done(world: World) -> None:
    harness = LocalHarness([])
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

    def make_runner() -> TransformersRunner:
        raise RuntimeError("no device")

    engine = LocalEngine(make_runner, on_crash=lambda: crashed.append(True)).start()
    engine.stop()
    assert crashed == [True]
    assert not engine.ready.is_set()

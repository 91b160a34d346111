"""An engine in this process, as the contract suite runs it, and what each local one has to keep."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from core.inference.engine import Engine
from core.inference.local_engine import LocalEngine
from core.inference.transformers_runner import TransformersRunner
from tests.support.engine_contract import MAX_ADAPTERS, MAX_WAITING
from tests.support.engine_world import World, collect, make_request

T = TypeVar("T")


class LocalHarness:
    """A local engine in float32.

    Args:
        world: Where its adapters are.
        runners: Gets the engine's runner, once that is made.
    """

    def __init__(self, world: World, runners: list[TransformersRunner]) -> None:
        def make_runner() -> TransformersRunner:
            runners.append(TransformersRunner("cpu", threads=1, precision="float32"))
            return runners[0]

        self.engine = LocalEngine(
            make_runner,
            world.locate_adapter,
            max_adapters=MAX_ADAPTERS,
            max_waiting=MAX_WAITING,
        ).start()
        assert self.engine.ready.wait(60)

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        async def main() -> T:
            return await scenario(self.engine)

        return asyncio.run(main())


def base_does_not_change(
    harness: LocalHarness, world: World, runners: list[TransformersRunner]
) -> None:
    ids = list(range(3, 60))

    async def forget(engine: Engine) -> None:
        for adapter in (await engine.status()).adapters:
            assert await engine.unload(adapter.digest)

    harness.run(lambda engine: collect(engine, make_request(world.base)))
    harness.run(forget)
    # The engine is idle, so this thread may use its model.
    rows = runners[0].bases[world.base.digest].rows
    expected = rows.logits_of(None, ids)
    for adapter in (world.a, world.b, world.c):
        harness.run(
            lambda engine, adapter=adapter: collect(engine, make_request(world.base, adapter))
        )
    assert torch.equal(rows.logits_of(None, ids), expected)
    assert not torch.equal(rows.logits_of(world.c.digest, ids), expected)
    harness.run(forget)
    assert torch.equal(rows.logits_of(None, ids), expected)
    assert rows.cache_bytes == 0

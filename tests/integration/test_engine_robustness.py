"""What the engine takes without harm: thousands of loads, a full queue, memory that runs out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from core.errors import TunesmithError, Unavailable
from core.inference.engine import Engine, Failed, GenerateRequest
from tests.support.adapters import AdapterMaker
from tests.support.engine_harness import LocalHarness
from tests.support.engine_limits import is_idle, is_waiting, wait_for
from tests.support.engine_process import EngineProcess
from tests.support.engine_world import World, collect, make_request

MIB = 1024**2


def resident_bytes(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


# PEFT takes several times as long for each, so that fewer have to do.
@pytest.mark.parametrize(
    ("activation", "cycles"),
    [
        pytest.param("silu", 2000, id="lean-2000", marks=pytest.mark.long),
        pytest.param("gelu", 200, id="generic-200"),
    ],
)
def test_memory_is_flat_over_loads_and_unloads(
    tmp_path: Path, activation: str, cycles: int
) -> None:
    world = World(tmp_path, hidden_act=activation)
    maker = AdapterMaker(Path(world.base.path))
    # Of every size, so that what has left is no place that just fits the next one.
    adapters = [
        world.keep(maker.make(tmp_path / f"adapter-{rank}", r=rank, seed=rank))
        for rank in (2, 64, 8, 32)
    ]
    harness = LocalHarness(world)
    process, sizes = psutil.Process(), []

    async def scenario(engine: Engine) -> None:
        for cycle in range(cycles):
            adapter = adapters[cycle % len(adapters)]
            loaded = await engine.load(world.base, adapter)
            assert await engine.unload(adapter.digest) == loaded.bytes > 0
            if cycle % (cycles // 40) == 0:
                sizes.append(resident_bytes(process))
        status = await engine.status()
        assert (status.loads, status.evictions, status.resident_bytes) == (cycles, cycles, 0)
        assert status.adapters == []

    harness.run(scenario)
    harness.engine.stop()
    # An adapter of rank 64 takes almost half a megabyte: a single matrix left behind would show.
    assert max(sizes[-10:]) - max(sizes[:10]) < 8 * MIB, sizes


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, EngineProcess]]:
    # A long context, so that nothing ends before the queue is full.
    world = World(tmp_path_factory.mktemp("crowded"), max_position_embeddings=8192)
    process = EngineProcess(world.data_dir, engine_max_waiting=1000, engine_precision="float32")
    try:
        yield world, process.wait_until_ready()
        assert process.stop() == 0, process.log.read_text()
    finally:
        process.kill()


def test_a_thousand_requests_wait_in_little_memory_and_are_all_answered(
    crowded: tuple[World, EngineProcess],
) -> None:
    world, engine_process = crowded
    process = psutil.Process(engine_process.process.pid)
    long = make_request(world.base, n=16, max_new_tokens=8000, min_new_tokens=8000)
    # Long prompts, which only those that are computed shall cost.
    short = make_request(world.base, prompt="jumps over the lazy dog. " * 60, max_new_tokens=4)

    async def scenario(engine: Engine) -> None:
        await asyncio.gather(*(collect(engine, short) for _ in range(16)))
        before = resident_bytes(process)
        async with aclosing(await engine.generate(long)):
            waiting = [asyncio.ensure_future(collect(engine, short)) for _ in range(1000)]
            await wait_for(lambda: is_waiting(engine, 1000), "the queue does not fill")
            refused = await asyncio.gather(
                *(engine.generate(short) for _ in range(8)), return_exceptions=True
            )
            grown = resident_bytes(process) - before
        for error in refused:
            assert isinstance(error, Unavailable)
            assert error.code == "engine_full"
            assert error.retry_after_seconds > 0
        texts = {answer.text for answer in await asyncio.gather(*waiting)}
        assert len(texts) == 1
        await wait_for(lambda: is_idle(engine), "not idle")
        assert (await engine.status()).row_bytes == 0
        # A connection and its request each, and nothing that is computed: less than 64 KiB.
        assert grown < 64 * MIB, grown
        assert (left := resident_bytes(process) - before) < 64 * MIB, left

    engine_process.run(scenario)


@asynccontextmanager
async def little_memory_left(process: psutil.Process, more: int) -> AsyncIterator[None]:
    """Let a process map only so many bytes more than it does now."""
    limit = process.memory_info().vms + more
    process.rlimit(psutil.RLIMIT_AS, (limit, -1))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, (-1, -1))


@pytest.mark.long
@pytest.mark.parametrize("activation", ["silu", "gelu"], ids=["lean", "generic"])
def test_memory_that_runs_out_in_one_request_fails_that_one_alone(
    tmp_path: Path, activation: str
) -> None:
    # Keys and values of 256 KiB for each token: sixteen rows of 250 tokens need a gigabyte.
    world = World(
        tmp_path,
        hidden_act=activation,
        max_position_embeddings=8192,
        head_dim=2048,
        num_key_value_heads=4,
        num_hidden_layers=4,
    )
    # The plan of the engine allows for it; it is the system that does not.
    engine_process = EngineProcess(
        world.data_dir, engine_precision="float32", engine_kv_bytes=8 * 1024 * MIB
    )
    process = psutil.Process(engine_process.process.pid)
    known, new = (
        make_request(
            world.base, world.a, prompt=words * 62, n=15, max_new_tokens=4, min_new_tokens=4
        )
        for words in ("over the lazy dog ", "dog lazy the over ")
    )
    others = [
        make_request(world.base, adapter, max_new_tokens=60, min_new_tokens=60)
        for adapter in (None, world.a, world.b)
    ]

    async def ask(engine: Engine, request: GenerateRequest) -> str:
        try:
            stream = await engine.generate(request)
            async with aclosing(stream):
                events = [event async for event in stream]
        except TunesmithError as error:
            return error.code
        last = events[-1]
        return str(last.error["code"]) if isinstance(last, Failed) else "answered"

    async def scenario(engine: Engine) -> None:
        before = [(await collect(engine, request)).text for request in others]
        assert await ask(engine, known) == "answered"
        await wait_for(lambda: is_idle(engine), "not idle")
        async with little_memory_left(process, 300 * MIB):
            beside = [asyncio.ensure_future(collect(engine, request)) for request in others]
            # Where it takes over what is known of its prompt, and where it reads that.
            codes = [await ask(engine, known), await ask(engine, new)]
            assert [answer.text for answer in await asyncio.gather(*beside)] == before
        assert codes == ["out_of_memory"] * 2
        await wait_for(lambda: is_idle(engine), "not idle")
        assert (await engine.status()).row_bytes == 0
        assert await ask(engine, new) == "answered"

    try:
        engine_process.wait_until_ready().run(scenario)
        assert engine_process.stop() == 0, engine_process.log.read_text()
    finally:
        engine_process.kill()

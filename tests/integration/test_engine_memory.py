"""What the engine does about memory: admission, the bank, base models and prefixes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.errors import Conflict, InvalidInput, Unavailable
from core.inference.budgets import Budgets
from core.inference.engine import AdapterRef, Engine, Failed, GenerateRequest
from core.inference.model_runner import ModelRunner
from core.inference.prefix_store import BLOCK_TOKENS
from tests.support.adapters import make_adapter
from tests.support.engine_harness import LocalHarness
from tests.support.engine_limits import is_idle, wait_for
from tests.support.engine_world import World, collect, make_request
from tests.support.polling import wait_until

# Of the tiny model: two layers, two key-value heads of 16, keys and values, float32.
TOKEN_BYTES = 2 * 2 * 16 * 2 * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("memory"))


@contextmanager
def engine_with(world: World, **options: Any) -> Iterator[LocalHarness]:
    harness = LocalHarness(world, **{"max_waiting": 64, **options})
    try:
        yield harness
    finally:
        harness.engine.stop()


def of_project(request: GenerateRequest, project_id: str) -> GenerateRequest:
    return request.model_copy(update={"project_id": project_id})


# Memory of rows.


def test_requests_run_together_only_as_far_as_their_memory_goes(world: World) -> None:
    # Four rows of 128 positions.
    with engine_with(world, budgets=Budgets(rows=4 * 128 * TOKEN_BYTES)) as harness:
        request = make_request(world.base, max_new_tokens=60, min_new_tokens=60)

        async def scenario(engine: Engine) -> int:
            await collect(engine, request)
            answers = asyncio.gather(*(collect(engine, request) for _ in range(12)))
            most = 0
            while not answers.done():
                most = max(most, (await engine.status()).row_bytes)
                await asyncio.sleep(0.001)
            assert len({answer.text for answer in await answers}) == 1
            return most

        assert harness.run(scenario) == 4 * 128 * TOKEN_BYTES
        assert harness.rows(world.base).cache_bytes == 0


def test_what_can_never_run_is_refused_with_the_reason(world: World) -> None:
    with engine_with(world, budgets=Budgets(rows=4 * 128 * TOKEN_BYTES)) as harness:
        for too_much in ({"max_new_tokens": 200, "n": 3}, {"max_new_tokens": 60, "n": 5}):
            request = make_request(world.base, **too_much)
            with pytest.raises(InvalidInput) as refused:
                harness.run(lambda engine, request=request: collect(engine, request))
            assert refused.value.code == "row_memory_exceeded"
            assert f"{4 * 128 * TOKEN_BYTES:,}" in refused.value.message
        fits = make_request(world.base, max_new_tokens=60, n=4)
        assert harness.run(lambda engine: collect(engine, fits)).done is not None


def test_the_cache_takes_no_more_than_what_was_planned(world: World) -> None:
    """A long row, then many short ones beside a survivor: both dimensions never grow at once."""
    limit = 4 * 512 * TOKEN_BYTES
    with engine_with(world, budgets=Budgets(rows=limit)) as harness:
        long = make_request(world.base, max_new_tokens=450, min_new_tokens=450)
        short = make_request(world.base, max_new_tokens=40, min_new_tokens=40)

        async def scenario(engine: Engine) -> int:
            most = 0
            running = [asyncio.ensure_future(collect(engine, long))]
            running += [asyncio.ensure_future(collect(engine, short)) for _ in range(30)]
            while not all(task.done() for task in running):
                most = max(most, (await engine.status()).row_bytes)
                await asyncio.sleep(0.001)
            await asyncio.gather(*running)
            return most

        assert 0 < harness.run(scenario) <= limit


def test_a_client_that_leaves_frees_its_rows_before_the_next_step(world: World) -> None:
    with engine_with(world) as harness:
        request = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)

        async def scenario(engine: Engine) -> None:
            await collect(engine, make_request(world.base, max_new_tokens=2))
            rows, sizes = harness.rows(world.base), []
            extend = rows.extend
            rows.extend = lambda several, pieces: (
                sizes.append(len(several)) or extend(several, pieces)
            )
            other = make_request(world.base, max_new_tokens=400, min_new_tokens=400)
            async with aclosing(await engine.generate(request)) as stream:
                await anext(stream)
                staying = await engine.generate(other.model_copy(update={"project_id": "other"}))
                await anext(staying)
                await wait_for(lambda: _is_last(sizes, 17), "they do not run together")
            # Commands are taken before each step: after this answer it is in none.
            await engine.status()
            left = len(sizes)
            await wait_for(lambda: _is_last(sizes[left:], 1), "the other one does not go on")
            assert set(sizes[left:]) == {1}
            await staying.aclose()
            await wait_for(lambda: is_idle(engine), "not idle")
            assert (await engine.status()).row_bytes == 0

        harness.run(scenario)


# Turns and deadlines.


def test_one_project_with_many_requests_does_not_hold_another_up(world: World) -> None:
    with engine_with(world, max_waiting=200) as harness:
        long = make_request(world.base, max_new_tokens=300, min_new_tokens=300)
        short = make_request(world.base, max_new_tokens=4)

        async def scenario(engine: Engine) -> None:
            many = [
                asyncio.ensure_future(collect(engine, of_project(long, "many"))) for _ in range(100)
            ]
            await wait_for(lambda: _waits(engine, 84), "the queue does not fill")
            for _ in range(5):
                answer = await collect(engine, of_project(short, "one"))
                assert answer.done is not None
                assert answer.done.timings.queue_ms < 250
            assert not any(task.done() for task in many)
            for task in many:
                task.cancel()
            await asyncio.gather(*many, return_exceptions=True)

        harness.run(scenario)


def test_a_deadline_ends_a_request_wherever_it_is(world: World) -> None:
    with engine_with(world) as harness:
        long = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)
        hurried = long.model_copy(update={"deadline_seconds": 0.15})

        async def scenario(engine: Engine) -> None:
            await collect(engine, make_request(world.base, max_new_tokens=2))
            events = [event async for event in await engine.generate(hurried)]
            assert isinstance(events[-1], Failed)
            assert events[-1].error["code"] == "deadline_exceeded"
            async with aclosing(await engine.generate(long)):
                with pytest.raises(Unavailable) as late:
                    await engine.generate(hurried)
                assert late.value.code == "deadline_exceeded"
                assert (await engine.status()).waiting == 0
            await wait_for(lambda: is_idle(engine), "not idle")

        harness.run(scenario)


# The bank.


def test_the_bank_holds_as_many_bytes_as_it_may(world: World) -> None:
    with engine_with(world) as harness:
        a = harness.run(lambda engine: engine.load(world.base, world.a)).bytes
        b = harness.run(lambda engine: engine.load(world.base, world.b)).bytes
        c = harness.run(lambda engine: engine.load(world.base, world.c)).bytes
    limit = max(a + b, b + c, a + c) + 1
    requests = [
        make_request(world.base, adapter, max_new_tokens=30)
        for adapter in (world.a, world.b, world.c)
    ]
    with engine_with(world, max_adapters=10, budgets=Budgets(adapters=limit)) as harness:

        async def scenario(engine: Engine) -> None:
            alone = [(await collect(engine, request)).text for request in requests]
            answers = asyncio.gather(*(collect(engine, requests[i % 3]) for i in range(30)))
            while not answers.done():
                assert (await engine.status()).resident_bytes <= limit
                await asyncio.sleep(0.001)
            assert [answer.text for answer in await answers] == alone * 10
            status = await engine.status()
            assert status.evictions > 0
            assert {adapter.tier for adapter in status.evicted} == {"disk"}

        harness.run(scenario)
    with engine_with(world, budgets=Budgets(adapters=min(a, b, c) - 1)) as harness:
        with pytest.raises(Conflict) as refused:
            harness.run(lambda engine: engine.load(world.base, world.a))
        assert refused.value.code == "adapter_too_large"


def test_kept_adapters_outlast_others(world: World) -> None:
    with engine_with(world, max_adapters=2) as harness:

        async def scenario(engine: Engine) -> None:
            assert (await engine.load(world.base, world.a, keep=True)).kept
            for adapter in (world.b, world.c, world.b, world.c):
                await collect(engine, make_request(world.base, adapter, max_new_tokens=2))
            status = await engine.status()
            assert {one.digest: one.kept for one in status.adapters} == {
                world.a.digest: True,
                world.c.digest: False,
            }
            assert status.warnings
            with pytest.raises(Conflict) as refused:
                await engine.load(world.base, world.c, keep=True)
            assert refused.value.code == "kept_adapters_full"
            assert await engine.release(world.a.digest)
            assert not await engine.release(world.a.digest)
            await engine.load(world.base, world.c, keep=True)

        harness.run(scenario)


def test_a_load_that_fails_while_others_want_the_adapter_fails_them_all(world: World) -> None:
    """Each of them may pin the adapter anew while the others still hold the failed load."""
    with engine_with(world, max_adapters=1) as harness:
        missing = AdapterRef(digest="e" * 64)

        async def scenario(engine: Engine) -> None:
            requests = [make_request(world.base, missing, max_new_tokens=2) for _ in range(20)]
            answers = await asyncio.gather(
                *(collect(engine, request) for request in requests), return_exceptions=True
            )
            codes = {getattr(answer, "code", answer) for answer in answers}
            assert codes <= {"adapter_files_missing", "engine_full"}
            good = await collect(engine, make_request(world.base, world.a, max_new_tokens=2))
            assert good.done is not None

        harness.run(scenario)


def test_unloading_gives_the_memory_back(tmp_path: Path) -> None:
    wide = World(tmp_path / "wide", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    adapter = wide.keep(make_adapter(tmp_path / "large", Path(wide.base.path), r=256))

    def rss() -> int:
        return int(psutil.Process().memory_info().rss)

    with engine_with(wide) as harness:

        async def load_and_unload(engine: Engine) -> tuple[int, int]:
            loaded = await engine.load(wide.base, adapter)
            grown = rss()
            assert await engine.unload(adapter.digest) == loaded.bytes
            return loaded.bytes, grown

        def comes_back(limit: int) -> bool:
            """Wait for the system to be given memory back, which is done in one go."""
            try:
                wait_until(lambda: rss() <= limit, 3, "it stays")
            except AssertionError:
                return False
            return True

        harness.run(lambda engine: collect(engine, make_request(wide.base, max_new_tokens=2)))
        # What is allocated once and for all is there after the first round; and one block that
        # another thread happens to allocate amid an adapter's may keep it from going back.
        kept: list[int] = []
        for _ in range(5):
            size, grown = harness.run(load_and_unload)
            comes_back(grown - size)
            before = rss()
            size, grown = harness.run(load_and_unload)
            assert size > 40 * 1024**2
            if comes_back(int(before + 0.2 * size)) and grown - before > 0.8 * size:
                return
            kept.append(rss() - before)
        pytest.fail(f"of {size} bytes these never came back: {kept}")


# Base models.


def test_two_base_models_share_the_memory_for_one(world: World) -> None:
    # The tiny model has 384 x 64 + 2 x 40,064 + … weights: about 0.4 MB in float32.
    sizes = ModelRunner("cpu", threads=1, precision="float32")
    limit = int(1.5 * sizes.size(world.base))
    with engine_with(world, budgets=Budgets(bases=limit)) as harness:
        base, twin = (make_request(ref, max_new_tokens=40) for ref in (world.base, world.twin))

        async def scenario(engine: Engine) -> None:
            texts = []
            for request in (base, twin, base):
                texts.append((await collect(engine, request)).text)
                status = await engine.status()
                assert status.base_models == [request.base_model.digest]
                assert 0 < status.base_bytes <= limit
            assert texts[0] == texts[2] != texts[1]
            # With an adapter, which leaves and comes back with its base model.
            tuned = make_request(world.base, world.a, max_new_tokens=40)
            answers = await asyncio.gather(
                *(collect(engine, request) for request in (tuned, twin, base) * 6)
            )
            assert len({answer.text for answer in answers[::3]}) == 1
            assert {answer.text for answer in answers[1::3]} == {texts[1]}
            assert {answer.text for answer in answers[2::3]} == {texts[0]}
            assert (await engine.status()).base_evictions >= 3
            # Keeping an adapter in stock is no reason to throw a base model out.
            await collect(engine, twin)
            with pytest.raises(Conflict) as refused:
                await engine.load(world.base, world.a, keep=True)
            assert refused.value.code == "base_model_not_loaded"
            assert (await engine.status()).base_models == [world.twin.digest]

        harness.run(scenario)
    with engine_with(world, budgets=Budgets(bases=1000)) as harness:
        with pytest.raises(Conflict) as refused:
            harness.run(lambda engine: collect(engine, base))
        assert refused.value.code == "base_model_too_large"


# Prefixes.

LONG = "the quick brown fox jumps over the lazy dog and then the other dog " * 6


@pytest.mark.parametrize("generic", [False, True])
def test_prompts_that_begin_alike_share_their_beginning(
    world: World, tmp_path_factory: pytest.TempPathFactory, generic: bool
) -> None:
    if generic:
        world = World(tmp_path_factory.mktemp("generic"), hidden_act="gelu")
    kinds = [
        (None, "p"),
        (world.a, "p"),
        (world.b, "p"),
        (world.a, "q"),
    ]

    def ask(adapter: AdapterRef | None, project: str, end: str) -> GenerateRequest:
        request = make_request(
            world.base, adapter, prompt=LONG + end, max_new_tokens=8, min_new_tokens=8, logprobs=5
        )
        return of_project(request, project)

    with engine_with(world, budgets=Budgets(prefixes=1)) as harness:
        expected = {
            (kind, end): harness.run(
                lambda engine, kind=kind, end=end: collect(engine, ask(*kind, end))
            )
            for kind in kinds
            for end in ("fox", "Paris")
        }
        assert harness.run(lambda engine: engine.status()).reused_prompt_tokens == 0
    with engine_with(world) as harness:

        async def scenario(engine: Engine) -> None:
            for kind in kinds:
                for end in ("fox", "Paris"):
                    before = (await engine.status()).reused_prompt_tokens
                    answer = await collect(engine, ask(*kind, end))
                    reused = (await engine.status()).reused_prompt_tokens - before
                    # Neither of another adapter, nor of another project.
                    assert (reused == 0) == (end == "fox")
                    reference = expected[kind, end]
                    assert answer.token_ids == reference.token_ids
                    for one, other in zip(answer.logprobs[0], reference.logprobs[0], strict=True):
                        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            status = await engine.status()
            assert 0 < status.prefix_bytes <= status.prefix_limit_bytes

        harness.run(scenario)


def test_prompts_that_are_read_at_the_same_time_share_the_work(world: World) -> None:
    with engine_with(world) as harness:
        busy = make_request(world.base, max_new_tokens=480, min_new_tokens=480)
        request = make_request(world.base, prompt=LONG, max_new_tokens=2)

        async def scenario(engine: Engine) -> None:
            # Beside running answers, prompts are read piece by piece.
            async with aclosing(await engine.generate(busy)) as stream:
                await anext(stream)
                answers = await asyncio.gather(*(collect(engine, request) for _ in range(4)))
            # Whenever they come: all but the last tokens of the prompt are read once.
            shared = (answers[0].started.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert len({answer.text for answer in answers}) == 1
            assert (await engine.status()).reused_prompt_tokens == 3 * shared > 0

        harness.run(scenario)


def test_a_prompt_is_shared_also_when_its_answer_is_a_single_token(world: World) -> None:
    with engine_with(world) as harness:
        first = make_request(world.base, prompt=LONG, max_new_tokens=1, n=3, logprobs=0)
        again = make_request(world.base, prompt=LONG, max_new_tokens=9, logprobs=0)
        one = harness.run(lambda engine: collect(engine, first))
        two = harness.run(lambda engine: collect(engine, again))
        assert two.token_ids[:1] == one.token_ids
        assert harness.run(lambda engine: engine.status()).reused_prompt_tokens > 0


async def _is_last(sizes: list[int], size: int) -> bool:
    return sizes[-1:] == [size]


async def _waits(engine: Engine, waiting: int) -> bool:
    return (await engine.status()).waiting == waiting


def test_settings_reach_the_limits() -> None:
    limits = Budgets(rows=7).within(1000)
    assert (limits.bases, limits.rows, limits.adapters, limits.prefixes) == (600, 7, 125, 31)

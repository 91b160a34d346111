"""Which engine a request goes to."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest

from core.config import Settings
from core.errors import Conflict, InvalidInput, Unavailable
from core.inference.engine import AdapterRef, BaseModelRef, EventStream, GenerateRequest
from service.engine_client import RemoteEngine
from service.engine_pool import EnginePool
from service.vllm_engine import VllmEngine
from tests.support.fake_engine import FakeEngine

BASE = BaseModelRef(name="m", digest="0" * 64, path="/nowhere")
HOT = "f" * 64


def make_request(digest: str | None = None, number: int = 0) -> GenerateRequest:
    adapter = AdapterRef(digest=digest) if digest else None
    return GenerateRequest(
        request_id=f"gen-{number}", project_id="p", base_model=BASE, adapter=adapter, prompt="Hi"
    )


def make_pool(count: int = 3) -> EnginePool:
    return EnginePool({f"unix:/run/{number}.sock": FakeEngine() for number in range(count)})


def fakes(pool: EnginePool) -> dict[str, FakeEngine]:
    return {a: engine for a, engine in pool.engines.items() if isinstance(engine, FakeEngine)}


def counts(pool: EnginePool) -> list[int]:
    """Return how many requests each engine got, the best one for `HOT` first."""
    return [len(fakes(pool)[address].requests) for address in pool.ranked(HOT)]


def test_an_adapter_has_its_engine_and_keeps_it_when_another_goes() -> None:
    digests = [f"{number:064x}" for number in range(300)]
    pool = make_pool(3)
    chosen = {digest: pool.ranked(digest)[0] for digest in digests}
    share = Counter(chosen.values())
    assert len(share) == 3
    assert min(share.values()) > 60

    gone = "unix:/run/1.sock"
    smaller = EnginePool({a: e for a, e in pool.engines.items() if a != gone})
    moved = {d for d in digests if smaller.ranked(d)[0] != chosen[d]}
    assert moved == {d for d in digests if chosen[d] == gone}


def test_requests_go_to_the_adapters_engine_and_base_requests_to_all() -> None:
    async def main() -> None:
        pool = make_pool(3)
        for number in range(30):
            async with aclosing(await pool.generate(make_request(HOT, number))):
                pass
        assert counts(pool) == [30, 0, 0]

        pool = make_pool(3)
        for number in range(60):
            async with aclosing(await pool.generate(make_request(None, number))):
                pass
        assert min(counts(pool)) >= 8

    asyncio.run(main())


def test_an_adapter_that_everybody_asks_for_gets_further_engines() -> None:
    async def main() -> None:
        pool = make_pool(3)
        open_streams: list[EventStream] = []
        for number in range(8):
            open_streams.append(await pool.generate(make_request(HOT, number)))
        assert counts(pool) == [8, 0, 0], "so few are no load"

        for number in range(52):
            open_streams.append(await pool.generate(make_request(HOT, number)))
        # At most 1.25 times the mean each: 25 of 60.
        assert counts(pool) == [25, 25, 10]

        for stream in open_streams:
            await stream.aclose()
            await stream.aclose()
        before = counts(pool)
        await pool.generate(make_request(HOT))
        assert counts(pool) == [before[0] + 1, *before[1:]], "its own engine is idle again"

    asyncio.run(main())


def test_a_request_is_in_flight_until_its_last_event() -> None:
    async def main() -> None:
        pool = make_pool(2)
        for _ in range(40):
            async for _ in await pool.generate(make_request(HOT)):
                pass
        assert counts(pool) == [40, 0]

        best, _ = (fakes(pool)[address] for address in pool.ranked(HOT))
        best.refusals[HOT] = Conflict("no", code="adapter_not_finite")
        for _ in range(40):
            with pytest.raises(Conflict):
                await pool.generate(make_request(HOT))
        assert counts(pool) == [80, 0], "what is refused is not in flight"

    asyncio.run(main())


@pytest.mark.parametrize(
    "elsewhere",
    [
        Unavailable("gone", code="engine_unavailable"),
        Unavailable("another secret", code="engine_secret_wrong"),
        Conflict("another base model", code="base_model_not_served"),
    ],
)
def test_an_engine_that_cannot_serve_is_passed_over(elsewhere: Unavailable | Conflict) -> None:
    async def main() -> None:
        pool = make_pool(2)
        first, second = (fakes(pool)[address] for address in pool.ranked(HOT))
        first.unavailable = elsewhere
        async with aclosing(await pool.generate(make_request(HOT))):
            assert len(second.requests) == 1
        await pool.load(BASE, AdapterRef(digest=HOT))
        assert (await second.status()).adapters

        second.unavailable = elsewhere
        with pytest.raises(type(elsewhere)) as refused:
            await pool.generate(make_request(HOT))
        assert refused.value.code == elsewhere.code

    asyncio.run(main())


def test_a_refusal_is_final() -> None:
    async def main() -> None:
        pool = make_pool(2)
        first, second = (fakes(pool)[address] for address in pool.ranked(HOT))
        first.unavailable = Unavailable("full", code="engine_full")
        with pytest.raises(Unavailable) as full:
            await pool.generate(make_request(HOT))
        assert full.value.code == "engine_full"

        first.unavailable = None
        first.refusals[HOT] = Conflict("no", code="base_model_mismatch")
        with pytest.raises(Conflict):
            await pool.generate(make_request(HOT))
        assert second.requests == []

    asyncio.run(main())


def test_the_status_is_that_of_the_engines_within_reach() -> None:
    async def main() -> None:
        pool = make_pool(2)
        await pool.load(BASE, AdapterRef(digest=HOT))
        first, second = (fakes(pool)[address] for address in pool.ranked(HOT))
        second.unavailable = Unavailable("gone", code="engine_unavailable")
        assert (await pool.status()).loads == 1
        first.unavailable = second.unavailable
        with pytest.raises(Unavailable):
            await pool.status()

    asyncio.run(main())


def test_addresses_say_what_kind_of_engine_is_there(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, engine_urls="http://a:1, vllm+http://b:2,vllm+https://c:3"
    )
    pool = EnginePool.from_settings(settings)
    kinds = {address: type(engine) for address, engine in pool.engines.items()}
    assert kinds == {
        "http://a:1": RemoteEngine,
        "vllm+http://b:2": VllmEngine,
        "vllm+https://c:3": VllmEngine,
    }
    asyncio.run(pool.aclose())


@pytest.mark.parametrize(
    "address", ["vllm+http://b", "vllm+http://b:2/v1", "vllm+http://k@b:2", "vllm+ftp://b:2", "b:2"]
)
def test_an_address_of_no_engine_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        EnginePool.from_settings(Settings(data_dir=tmp_path, engine_urls=address))
    assert refused.value.code == "invalid_engine_address"

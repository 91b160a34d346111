"""The client's own part: reading a stream, and picking an engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from core.errors import Conflict, InvalidInput, Unavailable
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Delta,
    Done,
    EngineEvent,
    Failed,
    GenerateRequest,
    Timings,
    parse_engine_address,
)
from service.engine_client import EnginePool, RemoteEngine
from tests.support.fake_engine import FakeEngine

BASE = BaseModelRef(name="m", digest="0" * 64, path="/nowhere")
DONE = Done(
    prompt_tokens=1,
    completion_tokens=1,
    timings=Timings(queue_ms=0, load_ms=0, first_token_ms=1, total_ms=1),
)


def make_request(digest: str | None = None, number: int = 0) -> GenerateRequest:
    adapter = AdapterRef(digest=digest) if digest else None
    return GenerateRequest(
        request_id=f"gen-{number}", project_id="p", base_model=BASE, adapter=adapter, prompt="Hi"
    )


def read(chunks: list[bytes], status: int = 200) -> list[EngineEvent]:
    async def main() -> list[EngineEvent]:
        engine = RemoteEngine("unix:/nowhere/engine.sock")

        async def body():  # type: ignore[no-untyped-def]
            for chunk in chunks:
                yield chunk

        def answer(request: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(status, content=body())

        engine._client = httpx2.AsyncClient(
            transport=httpx2.MockTransport(answer), base_url="http://engine"
        )
        events = [event async for event in await engine.generate(make_request())]
        await engine.aclose()
        return events

    return asyncio.run(main())


def line(event: EngineEvent) -> bytes:
    return event.model_dump_json().encode() + b"\n"


def test_no_character_of_a_text_ends_a_line() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh🚀"
    assert read([line(Delta(text=text)) + line(DONE)]) == [Delta(text=text), DONE]


def test_a_line_may_come_in_any_pieces() -> None:
    sent = line(Delta(text="Grüße 🚀")) + line(Delta(text="x")) + line(DONE)
    pieces = [sent[i : i + 1] for i in range(len(sent))]
    assert read(pieces) == read([sent]) == [Delta(text="Grüße 🚀"), Delta(text="x"), DONE]


@pytest.mark.parametrize("broken", [[], [b'{"type": "del'], [b"<html>\n"]])
def test_a_stream_that_breaks_off_ends_with_a_failure(broken: list[bytes]) -> None:
    *events, last = read([line(Delta(text="a")), *broken])
    assert events == [Delta(text="a")]
    assert isinstance(last, Failed)
    assert (last.error["code"], last.error["kind"]) == ("engine_lost", "Unavailable")


def test_an_engine_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async def main() -> None:
        engine = RemoteEngine(f"unix:{tmp_path}/engine.sock")
        with pytest.raises(Unavailable) as gone:
            await engine.status()
        assert gone.value.code == "engine_unavailable"
        await engine.aclose()

    asyncio.run(main())


def make_pool(count: int = 3) -> EnginePool:
    return EnginePool({f"unix:/run/{number}.sock": FakeEngine() for number in range(count)})


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
            await pool.generate(make_request("f" * 64, number))
        used = [address for address, fake in pool.engines.items() if _count(fake)]
        assert used == pool.ranked("f" * 64)[:1]

        pool = make_pool(3)
        for number in range(60):
            await pool.generate(make_request(None, number))
        assert all(_count(fake) >= 8 for fake in pool.engines.values())

    asyncio.run(main())


def test_an_engine_out_of_reach_is_passed_over_but_a_refusal_is_final() -> None:
    async def main() -> None:
        pool = make_pool(2)
        first, second = (pool.engines[address] for address in pool.ranked("f" * 64))
        assert isinstance(first, FakeEngine)
        assert isinstance(second, FakeEngine)
        first.unavailable = Unavailable("gone", code="engine_unavailable")
        await pool.generate(make_request("f" * 64))
        assert _count(second) == 1
        assert (await pool.status()).loads == 1

        first.unavailable = Unavailable("full", code="engine_full")
        with pytest.raises(Unavailable) as full:
            await pool.generate(make_request("f" * 64))
        assert full.value.code == "engine_full"

        first.unavailable = None
        first.refusals["f" * 64] = Conflict("no", code="base_model_mismatch")
        with pytest.raises(Conflict):
            await pool.generate(make_request("f" * 64))
        assert _count(second) == 1

        for fake in (first, second):
            fake.unavailable = Unavailable("gone", code="engine_unavailable")
        with pytest.raises(Unavailable):
            await pool.status()
        with pytest.raises(Unavailable):
            await pool.generate(make_request("f" * 64))

    asyncio.run(main())


@pytest.mark.parametrize(
    "address", ["engine:8100", "unix:relative", "https://h:1", "http://h", "http://h:1/x", ""]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_engine_address(address)
    assert refused.value.code == "invalid_engine_address"


def test_addresses_are_sockets_or_hosts() -> None:
    assert parse_engine_address("unix:/run/e.sock") == Path("/run/e.sock")
    assert parse_engine_address("http://engine-1:8100") == ("engine-1", 8100)
    assert parse_engine_address("http://[::1]:8100/") == ("::1", 8100)


def test_the_client_needs_no_model_library() -> None:
    program = (
        "import sys, service.engine_client; "
        "print([m for m in ('torch', 'transformers', 'peft', 'sqlalchemy') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout.strip() == "[]"


def _count(engine: object) -> int:
    assert isinstance(engine, FakeEngine)
    return len(engine.requests)

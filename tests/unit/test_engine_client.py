"""The client's own part: reading a stream."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from core.errors import InvalidInput, Unavailable
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
from service.engine_client import RemoteEngine

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
        "import sys, service.engine_pool; "
        "print([m for m in ('torch', 'transformers', 'peft', 'sqlalchemy') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout.strip() == "[]"

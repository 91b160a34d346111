"""The client's own part: reading a stream."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

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

Read = Callable[[list[bytes]], list[EngineEvent]]

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


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return the function that has an engine send these pieces and returns what was understood."""

    async def main(chunks: list[bytes]) -> list[EngineEvent]:
        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for chunk in chunks:
                await response.write(chunk)
            return response

        sender = web.Application()
        sender.router.add_post("/generate", answer)
        runner = web.AppRunner(sender)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
        engine = RemoteEngine(f"unix:{tmp_path}/engine.sock")
        try:
            return [event async for event in await engine.generate(make_request())]
        finally:
            await engine.aclose()
            await runner.cleanup()

    return lambda chunks: asyncio.run(main(chunks))


def line(event: EngineEvent) -> bytes:
    return event.model_dump_json().encode() + b"\n"


def test_no_character_of_a_text_ends_a_line(read: Read) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh🚀"
    assert read([line(Delta(text=text)) + line(DONE)]) == [Delta(text=text), DONE]


def test_a_line_may_come_in_any_pieces(read: Read) -> None:
    sent = line(Delta(text="Grüße 🚀")) + line(Delta(text="x")) + line(DONE)
    pieces = [sent[i : i + 1] for i in range(len(sent))]
    assert read(pieces) == read([sent]) == [Delta(text="Grüße 🚀"), Delta(text="x"), DONE]


@pytest.mark.parametrize("broken", [[], [b'{"type": "del'], [b"<html>\n"]])
def test_a_stream_that_breaks_off_ends_with_a_failure(read: Read, broken: list[bytes]) -> None:
    *events, last = read([line(Delta(text="a")), *broken])
    assert events == [Delta(text="a")]
    assert isinstance(last, Failed)
    assert (last.error["code"], last.error["kind"]) == ("engine_lost", "Unavailable")


def test_a_line_may_be_long(read: Read) -> None:
    whole = Delta(text="a whole answer at once " * 50_000)
    assert read([line(whole) + line(DONE)]) == [whole, DONE]


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

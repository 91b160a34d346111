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

# After it nothing comes, but the connection stays.
SILENCE = b"[]\n"

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
        asked = asyncio.Event()

        async def send(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await asked.wait()
            for chunk in chunks:
                await response.write(chunk)
            if chunks[-1:] == [SILENCE]:
                await asyncio.sleep(30)
            return response

        async def answer(request: web.Request) -> web.Response:
            asked.set()
            return web.json_response({})

        sender = web.Application()
        sender.router.add_get("/events/{name}", send)
        sender.router.add_post("/events/{name}/requests/0", answer)
        runner = web.AppRunner(sender, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
        engine = RemoteEngine(f"unix:{tmp_path}/engine.sock", timeout_seconds=0.3)
        try:
            return [event async for event in await engine.generate(make_request())]
        finally:
            await engine.aclose()
            await runner.cleanup()

    return lambda chunks: asyncio.run(main(chunks))


def line(*events: EngineEvent, number: int = 0) -> bytes:
    pairs = ", ".join(f"[{number}, {event.model_dump_json()}]" for event in events)
    return f"[{pairs}]\n".encode()


def test_no_character_of_a_text_ends_a_line(read: Read) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh🚀"
    assert read([line(Delta(text=text)) + line(DONE)]) == [Delta(text=text), DONE]


def test_a_line_may_come_in_any_pieces(read: Read) -> None:
    sent = line(Delta(text="Grüße 🚀")) + line(Delta(text="x")) + line(DONE)
    pieces = [sent[i : i + 1] for i in range(len(sent))]
    assert read(pieces) == read([sent]) == [Delta(text="Grüße 🚀"), Delta(text="x"), DONE]


@pytest.mark.parametrize(
    "broken", [[], [b'[[0, {"type": "del'], [b"<html>\n"], [b"[[0, {}]]\n"], [SILENCE]]
)
def test_a_stream_that_breaks_off_ends_with_a_failure(read: Read, broken: list[bytes]) -> None:
    *events, last = read([line(Delta(text="a")), *broken])
    assert events == [Delta(text="a")]
    assert isinstance(last, Failed)
    assert (last.error["code"], last.error["kind"]) == ("engine_lost", "Unavailable")


@pytest.mark.parametrize("broken", [[], [b"<html>\n"], [SILENCE]])
def test_an_engine_that_is_lost_before_the_first_event_may_be_asked_elsewhere(
    read: Read, broken: list[bytes]
) -> None:
    with pytest.raises(Unavailable) as gone:
        read(broken)
    assert gone.value.code == "engine_unavailable"


def test_events_of_requests_that_are_no_more_are_passed_over(read: Read) -> None:
    other = line(Delta(text="of another"), number=7)
    assert read([other + line(Delta(text="a"), DONE)]) == [Delta(text="a"), DONE]


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

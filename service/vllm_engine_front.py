"""The parent's side of `core.inference.front_process`: ask it, and replace it when it ends.

Owns one child process, started when it is first asked. Imports no model library.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from contextlib import suppress
from typing import Any

from core.child import (
    EVENTS_FD_VARIABLE,
    LIFELINE_FD_VARIABLE,
    MAX_FRAME_BYTES,
    FrameDecoder,
    encode_frame,
)
from core.errors import InvalidInput, Unavailable, from_wire
from core.lifeline import LIFELINE_VARIABLE
from core.logging import get_logger
from service.vllm_engine_text import TextShelf

_ARGV = [sys.executable, "-m", "core.inference.front_process"]
_READ_BYTES = 1024 * 1024

log = get_logger(__name__)


class FrontProcess:
    """Asks the front; used in one event loop.

    Attributes:
        texts: Of the tokens of base models.
    """

    def __init__(self) -> None:
        self.texts = TextShelf(self)
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._live: _Live | None = None

    async def start(self) -> None:
        """Start the front unless it runs; returns before it can answer."""
        await self._ensure_live()

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return what the front answers.

        Args:
            op: A method of `core.inference.front.Front`.
            fields: Its arguments, as JSON values.

        Raises:
            TunesmithError: What the method raises.
            Unavailable: Code `engine_unavailable`; the front ended meanwhile.
        """
        live = await self._ensure_live()
        number = next(self._numbers)
        frame = encode_frame({"op": "run", "task": {"id": number, "op": op, **fields}})
        if len(frame) > MAX_FRAME_BYTES:
            raise InvalidInput("the request is too large", code="prompt_too_long", field="prompt")
        answer = live.expect(number)
        try:
            await live.send(frame)
            return await answer
        finally:
            live.forget(number)

    async def aclose(self) -> None:
        """End the front."""
        live, self._live = self._live, None
        if live is not None:
            await live.close()

    async def _ensure_live(self) -> _Live:
        async with self._starting:
            if self._live is not None and self._live.ended:
                await self.aclose()
            if self._live is None:
                self._live = await _start()
                log.info("front_started", child_pid=self._live.process.pid)
            return self._live


async def _start() -> _Live:
    events, child_events = os.pipe()
    child_lifeline, lifeline = os.pipe()
    environment = {
        **os.environ,
        EVENTS_FD_VARIABLE: str(child_events),
        LIFELINE_FD_VARIABLE: str(child_lifeline),
    }
    environment.pop(LIFELINE_VARIABLE, None)  # its stdin carries requests
    try:
        process = await asyncio.create_subprocess_exec(
            *_ARGV,
            stdin=asyncio.subprocess.PIPE,
            # Ours is for the command's own words; libraries print what they like.
            stdout=asyncio.subprocess.DEVNULL,
            env=environment,
            pass_fds=(child_events, child_lifeline),
            # A Ctrl-C at the terminal is for us; our end of its pipes ends it.
            start_new_session=True,
        )
    except BaseException:
        os.close(events)
        os.close(lifeline)
        raise
    finally:
        os.close(child_events)
        os.close(child_lifeline)
    live = _Live(process, lifeline)
    await live.listen(events)
    return live


class _Live:
    """A started front, and who waits for its answers."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self.process = process
        self.ended = False
        self._lifeline = lifeline
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._decoder = FrameDecoder()
        self._writing = asyncio.Lock()

    async def listen(self, events: int) -> None:
        """Read answers from a pipe, from now on."""
        reader = asyncio.StreamReader()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(events, "rb", buffering=0)
        )
        self._listening = asyncio.create_task(self._listen(reader))

    def expect(self, number: int) -> asyncio.Future[dict[str, Any]]:
        """Return where the answer to a task will be."""
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        if self.ended:
            future.set_exception(_gone())
        return future

    def forget(self, number: int) -> None:
        """Drop an answer that nobody waits for any more."""
        future = self._waiting.pop(number, None)
        if future is not None and future.done() and not future.cancelled():
            future.exception()
        elif future is not None:
            future.cancel()

    async def send(self, frame: bytes) -> None:
        """Write one frame."""
        assert self.process.stdin is not None
        try:
            async with self._writing:
                self.process.stdin.write(frame)
                await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _gone() from error

    async def close(self) -> None:
        """End the process and wait for its end."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening
        self._transport.close()
        os.close(self._lifeline)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while chunk := await reader.read(_READ_BYTES):
                for frame in self._decoder.feed(chunk):
                    if frame.get("event") == "answer":
                        self._answer(frame)
        except (ValueError, KeyError) as error:
            log.error("front_broke_the_protocol", reason=repr(error))
        finally:
            self.ended = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(_gone())

    def _answer(self, frame: dict[str, Any]) -> None:
        future = self._waiting.get(frame["id"])
        if future is None or future.done():
            return
        if "error" in frame:
            future.set_exception(from_wire(frame["error"]))
        else:
            future.set_result(frame["result"])


def _gone() -> Unavailable:
    return Unavailable(
        "the process that prepares prompts has ended",
        code="engine_unavailable",
        hint="It is started again; send the request again.",
    )

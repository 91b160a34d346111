"""The client's end of an engine's connection for events; `engine/channels.py` is the other.

Owns which event belongs to which request, and what becomes of requests when the connection breaks.
Knows no torch and no database.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self
from uuid import uuid4

import aiohttp
from pydantic import TypeAdapter, ValidationError

from core.errors import TunesmithError, Unauthorized, Unavailable, from_wire, to_wire
from core.inference.engine import Done, EngineEvent, Failed, engine_lost

# Neither answers as long as there are events to come; `RemoteStream` watches over the silence.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)

_LINE: TypeAdapter[list[tuple[int, EngineEvent]]] = TypeAdapter(list[tuple[int, EngineEvent]])


class EngineChannel:
    """One connection on which all events of this process's requests come.

    Args:
        client: Opens connections to the engine.
        timeout_seconds: Longest silence of the engine while it works on a request.

    Attributes:
        closed: No request can be sent any more.
    """

    def __init__(self, client: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.closed = False
        self._client = client
        self._path = f"/events/{uuid4().hex}"
        self._numbers = itertools.count()
        self._streams: dict[int, RemoteStream] = {}
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> Self:
        """Connect.

        Raises:
            Unavailable: The engine cannot be reached.
        """
        async with translated(), asyncio.timeout(self.timeout_seconds):
            response = await self._client.get(self._path, timeout=_TIMEOUT)
            if response.status != 200:
                async with response:
                    raise error_of(response.status, await response.read())
        self._reading = asyncio.create_task(self._read(response))
        return self

    async def ask(self, body: str) -> RemoteStream:
        """Send a request and return its events, once the engine has accepted it.

        Args:
            body: A `GenerateRequest`.

        Raises:
            TunesmithError: The engine refuses it, see `Engine.generate`.
        """
        number = next(self._numbers)
        stream = self._streams[number] = RemoteStream(self, number)
        await stream.open(body)
        return stream

    async def post(self, number: int, body: str) -> None:
        """Send a request; return when it has ended. Cancelling this cancels it.

        Raises:
            TunesmithError: The engine refuses it, or is lost.
        """
        path = f"{self._path}/requests/{number}"
        async with (
            translated(),
            self._client.post(path, data=body, timeout=_TIMEOUT) as response,
        ):
            if response.status != 200:
                raise error_of(response.status, await response.read())

    def forget(self, number: int) -> None:
        """Take no more events of a request."""
        self._streams.pop(number, None)

    async def aclose(self) -> None:
        """Close the connection; requests that have not ended fail."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        pending = bytearray()
        try:
            while chunk := await response.content.readany():
                pending += chunk
                # A line may be much longer than what comes at a time.
                if b"\n" in chunk:
                    *lines, pending = pending.split(b"\n")
                    for line in lines:
                        self._hand_out(line)
        except (aiohttp.ClientError, TimeoutError, ValidationError):
            pass
        finally:
            self.closed = True
            response.close()
            for stream in list(self._streams.values()):
                stream.put(_unreachable())

    def _hand_out(self, line: bytes | bytearray) -> None:
        for number, event in _LINE.validate_json(line):
            # Nobody may want it any more.
            if (stream := self._streams.get(number)) is not None:
                stream.put(event)


class RemoteStream:
    """The events of one request; see `core.inference.engine.EventStream`.

    Args:
        channel: Where they come from.
        number: What the request is called there.
    """

    def __init__(self, channel: EngineChannel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._outcomes: asyncio.Queue[EngineEvent | TunesmithError] = asyncio.Queue()
        self._first: EngineEvent | None = None
        self._ended = False
        self._heard_at = self._loop.time()
        self._watch = self._loop.call_later(channel.timeout_seconds, self._check_silence)
        self._posting: asyncio.Task[None] | None = None

    async def open(self, body: str) -> None:
        """Send the request and wait for its first event.

        Raises:
            TunesmithError: The engine refuses it.
        """
        self._posting = asyncio.create_task(self._post(body))
        try:
            first = await self._outcomes.get()
        except BaseException:
            self._end()
            raise
        if isinstance(first, TunesmithError):
            self._end()
            raise first
        self._first = first

    def put(self, outcome: EngineEvent | TunesmithError) -> None:
        """Take what comes of the request."""
        self._heard_at = self._loop.time()
        self._outcomes.put_nowait(outcome)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        if self._ended:
            raise StopAsyncIteration
        event, self._first = self._first, None
        if event is None:
            try:
                outcome = await self._outcomes.get()
            except asyncio.CancelledError:
                self._end()
                raise
            if isinstance(outcome, TunesmithError):
                outcome = Failed(error=to_wire(engine_lost()))
            event = outcome
        if isinstance(event, Done | Failed):
            self._end(complete=isinstance(event, Done))
        return event

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        self._end()

    def _end(self, *, complete: bool = False) -> None:
        if not self._ended:
            self._ended = True
            self._watch.cancel()
            self._channel.forget(self._number)
            # What is complete ends by itself, and leaves its connection to the next request.
            if self._posting is not None and not complete:
                self._posting.cancel()

    async def _post(self, body: str) -> None:
        try:
            await self._channel.post(self._number, body)
        except TunesmithError as error:
            self.put(error)

    def _check_silence(self) -> None:
        silent = self._loop.time() - self._heard_at
        if silent >= self._channel.timeout_seconds:
            self.put(_unreachable())
        else:
            left = self._channel.timeout_seconds - silent
            self._watch = self._loop.call_later(left, self._check_silence)


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Raise `Unavailable` for what goes wrong on the way to the engine."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _unreachable() from error


def error_of(status_code: int, body: bytes) -> TunesmithError:
    """Return the error that an answer of the engine stands for."""
    try:
        members = json.loads(body)
        error = from_wire(members)
        if isinstance(error, Unauthorized):
            # It is our secret that is wrong, not the client's key.
            return Unavailable(error.message, code=error.code, hint=error.hint)
        return error
    except (ValueError, AttributeError):
        return TunesmithError(
            f"the engine answered with status {status_code}", code="internal_error"
        )


def _unreachable() -> Unavailable:
    return Unavailable(
        "the engine cannot be reached",
        code="engine_unavailable",
        hint="It may be starting; send the request again a little later.",
    )

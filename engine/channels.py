"""The way back to a client: one connection for the events of all its requests.

A pass of the model brings a token for every running answer. They leave in one line, so that engine
and client wake up once for a pass and not once for each answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect

from core.errors import Unavailable
from core.inference.engine import Engine, EngineEvent, GenerateRequest

_LINE: TypeAdapter[list[tuple[int, EngineEvent]]] = TypeAdapter(list[tuple[int, EngineEvent]])


class ForwardingEngine(Engine, Protocol):
    """An engine that hands events on where they come, see `LocalEngine.forward`."""

    async def forward(self, request: GenerateRequest, put: Callable[[EngineEvent], None]) -> None:
        """Answer a request, and return when it has ended."""
        ...


class Channel:
    """Takes the events of one client's requests to it."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, EngineEvent]] = []
        self._changed = asyncio.Event()
        self._requests = 0
        self._stopping = False
        self._closed = False

    async def carry(self, number: int, engine: ForwardingEngine, request: GenerateRequest) -> None:
        """Answer a request and send its events; cancelling this cancels the request.

        Args:
            number: What the client calls it.
            engine: What answers.
            request: The request.

        Raises:
            TunesmithError: It is refused before its first event, see `Engine.generate`.
            ClientDisconnect: The client takes no more events.
        """

        def put(event: EngineEvent) -> None:
            if self._closed:
                raise ClientDisconnect
            self._pending.append((number, event))
            self._changed.set()

        self._requests += 1
        try:
            await engine.forward(request, put)
        finally:
            self._requests -= 1
            self._changed.set()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Yield what there is to send, until `stop` was called and no request is left."""
        try:
            while self._requests or self._pending or not self._stopping:
                await self._changed.wait()
                self._changed.clear()
                pending, self._pending = self._pending, []
                if pending:
                    yield _LINE.dump_json(pending) + b"\n"
        finally:
            self._closed = True

    def stop(self) -> None:
        """End the connection as soon as the requests that it has are complete."""
        self._stopping = True
        self._changed.set()


class Channels:
    """The channels that are open, by the name that their client gave them."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}
        self._stopping = False

    async def open(self, name: str) -> AsyncGenerator[bytes, None]:
        """Open a channel and yield its lines; it is gone when that ends."""
        channel = self._channels[name] = Channel()
        if self._stopping:
            channel.stop()
        try:
            async with aclosing(channel.lines()) as lines:
                async for line in lines:
                    yield line
        finally:
            if self._channels.get(name) is channel:
                del self._channels[name]

    def find(self, name: str) -> Channel:
        """Return a channel.

        Raises:
            Unavailable: It is not open, most likely because the engine is being stopped.
        """
        channel = self._channels.get(name)
        if channel is None:
            raise Unavailable(
                "the connection for events is not open",
                code="engine_unavailable",
                hint="Send the request again.",
            )
        return channel

    def stop(self) -> None:
        """End every channel as soon as it has no request left."""
        self._stopping = True
        for channel in self._channels.values():
            channel.stop()

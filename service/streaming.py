"""Server-sent events: encoding, keep-alive comments, and the end when the reader has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect, Request
from starlette.types import Send

T = TypeVar("T")

KEEP_ALIVE_SECONDS = 15.0
_KEEP_ALIVE = format_sse_event(comment="keep-alive")


def encode_event(data: str, *, event: str | None = None, id: str | None = None) -> bytes:  # noqa: A002
    """Return one event in wire form; `data` is JSON text."""
    return format_sse_event(data_str=data, event=event, id=id)


class EventStream(EventSourceResponse):
    """A response of server-sent events that closes its source when the client leaves.

    Args:
        events: Encoded events.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = with_keep_alive(events)
        # Proxies such as nginx would otherwise hold events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def stream_response(self, send: Send) -> None:
        """Send everything; close the source even if the client has left half-way."""
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


async def with_keep_alive(
    events: AsyncGenerator[bytes, None], seconds: float | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield `events`, and a comment whenever none has come for `seconds`."""
    interval = KEEP_ALIVE_SECONDS if seconds is None else seconds
    pending: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(_next_or_none(events))
            while not (await asyncio.wait({pending}, timeout=interval))[0]:
                yield _KEEP_ALIVE
            event = pending.result()
            if event is None:
                return
            yield event
    finally:
        with anyio.CancelScope(shield=True):
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.wait({pending})
            await events.aclose()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client leaves first.

    Args:
        request: Its body must have been read.
        work: What to do for it.

    Raises:
        ClientDisconnect: The client left; `work` has ended.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        unfinished = {task for task in (working, watching) if not task.done()}
        for task in unfinished:
            task.cancel()
        if unfinished:
            with anyio.CancelScope(shield=True):
                await asyncio.wait(unfinished)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next_or_none(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)

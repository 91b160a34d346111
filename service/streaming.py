"""Server-sent events: encoding, keep-alive comments, and the end when the reader has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Send

T = TypeVar("T")

KEEP_ALIVE_SECONDS = 15.0
_COMMENT = format_sse_event(comment="keep-alive")


def encode_event(data: str, *, event: str | None = None, id: str | None = None) -> bytes:  # noqa: A002
    """Return one event in wire form; `data` is JSON text."""
    return format_sse_event(data_str=data, event=event, id=id)


class EventStream(EventSourceResponse):
    """A response of server-sent events that closes its source when the client leaves.

    When no event has come for `KEEP_ALIVE_SECONDS`, a comment is sent in its place.

    Args:
        events: Encoded events.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        # Proxies such as nginx would otherwise hold events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)

    async def stream_response(self, send: Send) -> None:
        """Send everything; close the source even if the client has left half-way."""
        outlet = _Outlet(send)
        comments = asyncio.create_task(outlet.send_comments())
        try:
            await super().stream_response(outlet)
        finally:
            comments.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({comments})
                await self._events.aclose()


class _Outlet:
    """Sends a response's messages, and a comment whenever there were none for a while.

    The comments have one task for the whole stream. To wait for each event with a time limit would
    take a task for every token, which cost more than all else that is done here for it.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._now = asyncio.get_running_loop().time
        # Nothing may come before the headers, nor while a message waits for a slow client.
        self._quiet_since: float | None = None

    async def __call__(self, message: Message) -> None:
        """Send one message."""
        self._quiet_since = None
        await self._send(message)
        self._quiet_since = self._now()

    async def send_comments(self) -> None:
        """Send comments between the messages, until this is cancelled or the client has left."""
        # Whoever sends the next event notices that as well.
        with suppress(OSError):
            while True:
                quiet = 0.0 if self._quiet_since is None else self._now() - self._quiet_since
                if quiet >= KEEP_ALIVE_SECONDS:
                    await self({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                else:
                    await asyncio.sleep(KEEP_ALIVE_SECONDS - quiet)


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

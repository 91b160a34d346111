"""An engine in another process, and a client's view of it.

Owns the client's end of the engine's wire format; `engine/server.py` is the other. Knows no torch
and no database.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
from pydantic import TypeAdapter, ValidationError

from core.errors import TunesmithError, Unauthorized, Unavailable, from_wire, to_wire
from core.inference.engine import (
    ENGINE_SECRET_HEADER,
    AdapterRef,
    BaseModelRef,
    Done,
    EngineEvent,
    EngineStatus,
    EventStream,
    Failed,
    GenerateRequest,
    LoadRequest,
    ResidentAdapter,
    parse_engine_address,
)

_CONNECT_SECONDS = 5.0
_STATUS_TIMEOUT = aiohttp.ClientTimeout(total=10.0, sock_connect=_CONNECT_SECONDS)
# Less than the engine's, so that it does not close a connection just as a request is sent on it.
_KEEPALIVE_SECONDS = 2.0
# Admission is the engine's business; connections are only bounded against a run-away.
_MAX_CONNECTIONS = 1024

_EVENT: TypeAdapter[EngineEvent] = TypeAdapter(EngineEvent)


class RemoteEngine:
    """Speaks to the engine process at one address; see `core.inference.engine.Engine`.

    Args:
        address: `unix:PATH` or `http://HOST:PORT`.
        secret: The shared secret of an engine that listens on TCP.
        timeout_seconds: Longest silence of the engine while it works on a request.
    """

    def __init__(self, address: str, *, secret: str = "", timeout_seconds: float = 600.0) -> None:
        self.address = address
        self._where = parse_engine_address(address)
        self._headers = {ENGINE_SECRET_HEADER: secret} if secret else {}
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=timeout_seconds
        )
        # Opened in the event loop that it then belongs to.
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request; see `Engine.generate`."""
        # Unset fields stay unset: the engine fits a default `max_new_tokens` to the context.
        body = request.model_dump_json(exclude_unset=True)
        async with self._translated():
            response = await self._client.post("/generate", data=body)
            if response.status != 200:
                async with response:
                    raise _error_of(response.status, await response.read())
        return _RemoteStream(response)

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident; see `Engine.load`."""
        wanted = LoadRequest(base_model=base_model, adapter=adapter, keep=keep)
        body = await self._call("POST", "/adapters", data=wanted.model_dump_json())
        return ResidentAdapter.model_validate_json(body)

    async def unload(self, digest: str) -> int:
        """Forget an adapter; see `Engine.unload`."""
        body = await self._call("DELETE", f"/adapters/{digest}")
        return int(json.loads(body)["freed_bytes"])

    async def release(self, digest: str) -> bool:
        """Keep an adapter no longer; see `Engine.release`."""
        body = await self._call("DELETE", f"/kept/{digest}")
        return bool(json.loads(body)["released"])

    async def status(self) -> EngineStatus:
        """Return residency and counters; see `Engine.status`."""
        body = await self._call("GET", "/status", timeout=_STATUS_TIMEOUT)
        return EngineStatus.model_validate_json(body)

    async def _call(self, method: str, path: str, **options: Any) -> bytes:
        async with self._translated(), self._client.request(method, path, **options) as response:
            content = await response.read()
        if response.status != 200:
            raise _error_of(response.status, content)
        return content

    @property
    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits: dict[str, Any] = {
                "limit": _MAX_CONNECTIONS,
                "keepalive_timeout": _KEEPALIVE_SECONDS,
            }
            local = isinstance(self._where, Path)
            self._session = aiohttp.ClientSession(
                base_url="http://engine" if local else self.address,
                connector=aiohttp.UnixConnector(str(self._where), **limits)
                if local
                else aiohttp.TCPConnector(**limits),
                headers=self._headers,
                timeout=self._timeout,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(
                "the engine cannot be reached",
                code="engine_unavailable",
                hint="It may be starting; send the request again a little later.",
            ) from error


class _RemoteStream:
    """The events of one request, line by line from an open response."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._pending = bytearray()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            event = _EVENT.validate_json(await self._line())
        except (aiohttp.ClientError, TimeoutError, ValidationError, EOFError):
            event = Failed(
                error=to_wire(
                    Unavailable(
                        "the engine was lost while it answered",
                        code="engine_lost",
                        hint="Send the request again.",
                    )
                )
            )
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(event, Done | Failed):
            await self.aclose()
        return event

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        self._ended = True
        self._response.close()

    async def _line(self) -> bytes:
        # A line may be longer than what the response would take for one.
        while (end := self._pending.find(b"\n")) < 0:
            chunk = await self._response.content.readany()
            if not chunk:
                raise EOFError
            self._pending += chunk
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line


def _error_of(status_code: int, body: bytes) -> TunesmithError:
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

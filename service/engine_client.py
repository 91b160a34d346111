"""An engine in another process, and a client's view of it.

Owns the client's end of the engine's wire format; `engine/server.py` is the other. The events of
answers come by `service/engine_channel.py`. Knows no torch and no database.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from core.inference.engine import (
    ENGINE_SECRET_HEADER,
    AdapterRef,
    BaseModelRef,
    EngineStatus,
    EventStream,
    GenerateRequest,
    LoadRequest,
    ResidentAdapter,
    parse_engine_address,
)
from service.engine_channel import EngineChannel, error_of, translated

_CONNECT_SECONDS = 5.0
_STATUS_TIMEOUT = aiohttp.ClientTimeout(total=10.0, sock_connect=_CONNECT_SECONDS)
# Less than the engine's, so that it does not close a connection just as a request is sent on it.
_KEEPALIVE_SECONDS = 2.0
# Admission is the engine's business; connections are only bounded against a run-away.
_MAX_CONNECTIONS = 1024


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
        self._timeout_seconds = timeout_seconds
        # Both are opened in the event loop that they then belong to.
        self._session: aiohttp.ClientSession | None = None
        self._channel: EngineChannel | None = None
        self._opening = asyncio.Lock()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._channel is not None:
            await self._channel.aclose()
        if self._session is not None:
            await self._session.close()

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request; see `Engine.generate`."""
        # Unset fields stay unset: the engine fits a default `max_new_tokens` to the context.
        body = request.model_dump_json(exclude_unset=True)
        return await (await self._open_channel()).ask(body)

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
        async with translated(), self._client.request(method, path, **options) as response:
            content = await response.read()
        if response.status != 200:
            raise error_of(response.status, content)
        return content

    async def _open_channel(self) -> EngineChannel:
        async with self._opening:
            if self._channel is None or self._channel.closed:
                self._channel = await EngineChannel(self._client, self._timeout_seconds).open()
            return self._channel

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
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=_CONNECT_SECONDS, sock_read=self._timeout_seconds
                ),
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

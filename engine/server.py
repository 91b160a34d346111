"""The engine over HTTP: requests and errors as JSON, events as lines of JSON.

Owns the mapping between the Engine protocol and HTTP; `service/engine_client.py` is the other end.
Knows no torch. Nothing is ever unpickled.

    GET /events/{name}                      → lines of [[number, EngineEvent], …]
    POST /events/{name}/requests/{number}   GenerateRequest → {} when its last event was sent
    POST /adapters                          LoadRequest → ResidentAdapter
    DELETE /adapters/{d}                    → {"freed_bytes": int}
    DELETE /kept/{d}                        → {"released": bool}
    GET /status                             → EngineStatus

A client opens one connection for events, under a name that nobody else knows, and says at each
request to which it belongs and what number its events shall bear. Whoever breaks a request off
cancels it. An error before the first event has a status of its own and the body of
`core.errors.to_wire`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    TooLarge,
    TunesmithError,
    Unauthorized,
    Unavailable,
    to_wire,
)
from core.inference.engine import (
    ENGINE_SECRET_HEADER,
    GenerateRequest,
    LoadRequest,
)
from engine.channels import Channels, ForwardingEngine

# The first match wins, so subclasses come before their parents.
_STATUS_BY_KIND: tuple[tuple[type[TunesmithError], int], ...] = (
    (TooLarge, 413),
    (InvalidInput, 422),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Unavailable, 503),
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


def create_app(engine: ForwardingEngine, secret: str | None, channels: Channels) -> ASGIApp:
    """Return the ASGI application of an engine.

    Args:
        engine: What answers.
        secret: Required of every request; `None` where the socket's permissions protect it.
        channels: Where events leave.
    """

    async def events(request: Request) -> Response:
        return _ChannelResponse(channels, request.path_params["name"])

    async def generate(request: Request) -> Response:
        wanted = await _parse(request, GenerateRequest)
        channel = channels.find(request.path_params["name"])
        number = request.path_params["number"]
        await _until_disconnect(request, channel.carry(number, engine, wanted))
        return JSONResponse({})

    async def load(request: Request) -> Response:
        wanted = await _parse(request, LoadRequest)
        return _json(await engine.load(wanted.base_model, wanted.adapter, keep=wanted.keep))

    async def unload(request: Request) -> Response:
        return JSONResponse({"freed_bytes": await engine.unload(request.path_params["digest"])})

    async def release(request: Request) -> Response:
        return JSONResponse({"released": await engine.release(request.path_params["digest"])})

    async def status(request: Request) -> Response:
        return _json(await engine.status())

    app = Starlette(
        routes=[
            Route("/events/{name}", events, methods=["GET"]),
            Route("/events/{name}/requests/{number:int}", generate, methods=["POST"]),
            Route("/adapters", load, methods=["POST"]),
            Route("/adapters/{digest}", unload, methods=["DELETE"]),
            Route("/kept/{digest}", release, methods=["DELETE"]),
            Route("/status", status, methods=["GET"]),
        ],
        exception_handlers={
            TunesmithError: _render_error,
            ClientDisconnect: _render_nothing,
            Exception: _render_unexpected,
        },
    )
    return app if secret is None else _SecretGuard(app, secret)


class _SecretGuard:
    """Lets only requests with the shared secret through."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = ENGINE_SECRET_HEADER.encode()
            given = next((value for key, value in scope["headers"] if key == name), b"")
            if not hmac.compare_digest(given, self._secret):
                error = Unauthorized(
                    "the engine's shared secret is missing or wrong",
                    code="engine_secret_wrong",
                    hint="Set TUNESMITH_ENGINE_SECRET to the same value for API and engine.",
                )
                await _answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _ChannelResponse(StreamingResponse):
    """A channel's lines; however it ends, the channel is closed."""

    def __init__(self, channels: Channels, name: str) -> None:
        self._lines = channels.open(name)
        super().__init__(self._lines, media_type="application/x-ndjson")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def _until_disconnect(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Await `answer`, but cancel it when the client goes away.

    Raises:
        ClientDisconnect: The client went away.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        for task in (answering, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parse(request: Request, model: type[M]) -> M:
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise InvalidInput(
            f"the engine cannot read the request: {first['msg']}",
            code="invalid_engine_request",
            field=".".join(str(part) for part in first["loc"]) or None,
            hint="API and engine must run the same version.",
        ) from error


def _json(value: BaseModel) -> Response:
    return Response(value.model_dump_json(), media_type="application/json")


def _answer(error: TunesmithError) -> Response:
    status = next((code for kind, code in _STATUS_BY_KIND if isinstance(error, kind)), 500)
    return JSONResponse(to_wire(error), status_code=status)


def _render_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunesmithError)
    return _answer(error)


def _render_nothing(request: Request, error: Exception) -> Response:
    # Nobody is there to read it; the status is that of nginx for a client that has left.
    return Response(status_code=499)


def _render_unexpected(request: Request, error: Exception) -> Response:
    return _answer(TunesmithError("the engine failed on this request", code="internal_error"))

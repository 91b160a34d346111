"""A vLLM server's HTTP interface, as far as an engine needs it, and what its errors mean.

Speaks to `vllm serve` as of version 0.32 (https://docs.vllm.ai), to its OpenAI-compatible paths
and to those that load and unload LoRA adapters.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, ValidationError

from core.errors import Conflict, InvalidInput, TunesmithError, Unavailable

SCHEMES = ("vllm+http", "vllm+https")

_CONNECT_SECONDS = 5.0
_STATUS_SECONDS = 10.0
_MAX_CONNECTIONS = 1024
_MAX_MESSAGE_CHARACTERS = 500
# How vLLM says that a name is taken already.
_LOADED_ALREADY = "already been loaded"


class ModelMissing(Exception):
    """The server knows no model of that name: it was restarted, or somebody unloaded it."""


class ModelCard(BaseModel):
    """An entry of `/v1/models`.

    Attributes:
        id: The name that requests use.
        root: Directory or repository of the base model; directory of an adapter.
        parent: Name of an adapter's base model; `None` for a base model.
        max_model_len: Tokens that prompt and answer may have together.
    """

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _ModelList(BaseModel):
    data: list[ModelCard]


def parse_vllm_address(address: str) -> str:
    """Return the URL of a vLLM server.

    Raises:
        InvalidInput: It is neither `vllm+http://HOST:PORT` nor `vllm+https://HOST:PORT`.
    """
    try:
        parts = urlsplit(address)
        if (
            parts.scheme in SCHEMES
            and parts.hostname
            and parts.port
            and parts.path in ("", "/")
            and not (parts.query or parts.fragment or parts.username or parts.password)
        ):
            return address.removeprefix("vllm+").rstrip("/")
    except ValueError:
        pass
    raise InvalidInput(
        f"{address!r} is not the address of a vLLM server",
        code="invalid_engine_address",
        field="TUNESMITH_ENGINE_URLS",
        hint="Give vllm+http://HOST:PORT or vllm+https://HOST:PORT; the key is a setting.",
    )


class VllmServer:
    """One vLLM server.

    Args:
        url: Such as `http://HOST:PORT`.
        api_key: What it was given as `--api-key`; empty if nothing.
        timeout_seconds: Longest silence of the server while it works on a request.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_seconds: float = 600.0) -> None:
        self._client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(
                limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS, keepalive_expiry=2.0)
            ),
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx2.Timeout(timeout_seconds, connect=_CONNECT_SECONDS),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def models(self) -> list[ModelCard]:
        """Return the base models and adapters that the server answers for.

        Raises:
            Unavailable: It cannot be reached, or refuses our key.
        """
        body = await self._call("GET", "/v1/models", timeout=_STATUS_SECONDS)
        try:
            return _ModelList.model_validate_json(body).data
        except ValidationError as error:
            raise Unavailable(
                "what answers there is no vLLM server", code="engine_unavailable"
            ) from error

    async def version(self) -> str:
        """Return the server's version."""
        body = await self._call("GET", "/version", timeout=_STATUS_SECONDS)
        return str(json.loads(body).get("version", ""))

    async def load_adapter(self, name: str, directory: str) -> None:
        """Load an adapter; one that is there already stays as it is.

        Raises:
            Conflict: Code `adapter_refused`, with the server's reason; or `adapters_not_loadable`
                when the server was not started so that adapters can be loaded.
            Unavailable: The server is gone.
        """
        response = await self._post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": directory}
        )
        if response.is_success:
            return
        message = _message(response.content)
        if response.status_code == 400 and _LOADED_ALREADY in message:
            return
        _check_key(response)
        if response.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            raise Conflict(
                "the vLLM server does not load adapters while it runs",
                code="adapters_not_loadable",
                hint="Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
            )
        # An engine that has died answers in the same way as one that refuses.
        await self._call("GET", "/health", timeout=_STATUS_SECONDS)
        raise Conflict(
            f"the vLLM server refuses the adapter: {message}",
            code="adapter_refused",
            hint="Look at its --max-lora-rank, and whether it sees the artifacts' directory under "
            "the same path.",
        )

    async def unload_adapter(self, name: str) -> None:
        """Have the server forget an adapter; a no-op for one that is not there."""
        response = await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if not response.is_success and response.status_code != 404:
            raise _error_of(response.status_code, response.content)

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a whole completion.

        Raises:
            ModelMissing: The server does not know the model.
            TunesmithError: It refuses the request or is gone.
        """
        response = await self._post("/v1/completions", body)
        if not response.is_success:
            raise _error_of(response.status_code, response.content)
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, body: dict[str, Any]) -> httpx2.Response:
        """Return the open response of a streamed completion; closing it cancels the request.

        Raises:
            ModelMissing: The server does not know the model.
            TunesmithError: It refuses the request or is gone.
        """
        async with _translated():
            sent = self._client.build_request("POST", "/v1/completions", json=body)
            response = await self._client.send(sent, stream=True)
            if response.status_code != 200:
                try:
                    raise _error_of(response.status_code, await response.aread())
                finally:
                    await response.aclose()
        return response

    async def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        async with _translated():
            return await self._client.post(path, json=body)

    async def _call(self, method: str, path: str, **options: Any) -> bytes:
        async with _translated():
            response = await self._client.request(method, path, **options)
            if not response.is_success:
                raise _error_of(response.status_code, response.content)
            return response.content


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise _unreachable("the vLLM server cannot be reached") from error


def _unreachable(message: str) -> Unavailable:
    return Unavailable(
        message,
        code="engine_unavailable",
        hint="It may be starting; send the request again a little later.",
    )


def _check_key(response: httpx2.Response) -> None:
    if response.status_code in (401, 403):
        raise _error_of(response.status_code, response.content)


def _error_of(status_code: int, body: bytes) -> Exception:
    message = _message(body)
    if status_code in (401, 403):
        # It is our key that is wrong, not the client's.
        return Unavailable(
            "the vLLM server refuses our key",
            code="engine_secret_wrong",
            hint="Set TUNESMITH_VLLM_API_KEY to what the server was given as --api-key.",
        )
    if status_code == 404:
        return ModelMissing(message)
    if status_code in (400, 422):
        return InvalidInput(
            f"the vLLM server refuses the request: {message}",
            code="engine_refused",
            hint="docs/serving.md says what a vLLM server computes.",
        )
    if status_code == 429:
        return Unavailable("the vLLM server is full", code="engine_full")
    if status_code >= 500:
        return _unreachable(f"the vLLM server fails: {message}")
    return TunesmithError(
        f"the vLLM server answered with status {status_code}", code="internal_error"
    )


def _message(body: bytes) -> str:
    """Return what an error body says, in vLLM's, FastAPI's or an older form."""
    try:
        members = json.loads(body)
        error = members.get("error", members)
        text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = None
    return str(text or "no reason given")[:_MAX_MESSAGE_CHARACTERS]

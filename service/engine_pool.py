"""Several engines as one: which of them a request goes to.

Owns the choice, and what the engines' addresses mean. Knows no torch and no database.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Self, TypeVar

from core.config import Settings
from core.errors import Conflict, Unavailable
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Done,
    Engine,
    EngineEvent,
    EngineStatus,
    EventStream,
    Failed,
    GenerateRequest,
    ResidentAdapter,
)
from core.storage import ArtifactStore, open_store
from service.engine_client import RemoteEngine
from service.vllm_engine import VllmEngine
from service.vllm_engine_base import BASE_MODEL_NOT_SERVED
from service.vllm_engine_front import FrontProcess
from service.vllm_engine_http import SCHEMES

# While the shared secret is changed, some engines have the old one. And a vLLM server has one base
# model, so that another engine may be the one that serves what is asked for.
_ELSEWHERE = frozenset({"engine_unavailable", "engine_secret_wrong", BASE_MODEL_NOT_SERVED})

# An engine is passed over above this many times the mean of all.
_LOAD_FACTOR = 1.25
# Fewer than this is no load: they are computed side by side, and a cold adapter costs more.
_LIGHT_LOAD = 8

T = TypeVar("T")


def open_engine(
    settings: Settings,
    address: str,
    *,
    front: FrontProcess,
    store: ArtifactStore | None = None,
    timeout_seconds: float | None = None,
) -> RemoteEngine | VllmEngine:
    """Return a client of the engine at an address.

    Args:
        settings: Of this process.
        address: `unix:PATH`, `http://HOST:PORT` or `vllm+http://HOST:PORT`.
        front: Prepares prompts for vLLM servers.
        store: Where the adapters of vLLM servers are; the configured one by default.
        timeout_seconds: Longest silence of the engine; the configured one by default.

    Raises:
        InvalidInput: Code `invalid_engine_address`.
    """
    timeout = timeout_seconds or settings.generate_timeout_seconds
    if not address.startswith(tuple(f"{scheme}:" for scheme in SCHEMES)):
        secret = settings.engine_secret.get_secret_value()
        return RemoteEngine(address, secret=secret, timeout_seconds=timeout)
    return VllmEngine(
        address,
        locate_adapter=(store or open_store(settings)).adapter_path,
        front=front,
        api_key=settings.vllm_api_key.get_secret_value(),
        precision=settings.vllm_precision,
        max_adapters=settings.engine_max_adapters,
        adapter_bytes=settings.engine_adapter_bytes,
        max_rows=settings.vllm_max_rows,
        max_waiting=settings.engine_max_waiting,
        timeout_seconds=timeout,
        neutral_root=settings.root / "neutral-adapters" if settings.vllm_neutral_adapter else None,
    )


class EnginePool:
    """Several engines as one: an adapter has its engine, so that it stays warm there.

    The engine of an adapter is the one with the highest hash of (address, digest), rendezvous
    hashing (Thaler & Ravishankar, 1998): when an engine comes or goes, only its share moves. One
    that has more than 1.25 times the mean of this process's requests in flight is passed over for
    the next in that order, so that an adapter that everybody asks for gets as many engines as it
    needs (bounded loads: Mirrokni, Thorup & Zadimoghaddam, 2018). Passed over is also an engine
    that cannot be reached, has another secret or does not serve the base model. Requests for the
    base model are spread evenly.

    Args:
        engines: By address, at least one.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        if not engines:
            raise ValueError("a pool needs an engine")
        self.engines = engines
        self._in_flight: Counter[str] = Counter()
        self._front: FrontProcess | None = None

    @classmethod
    def from_settings(cls, settings: Settings, store: ArtifactStore | None = None) -> Self:
        """Return a pool of the configured engines.

        Args:
            settings: Name the engines.
            store: Where vLLM servers' adapters are; the configured one by default.

        Raises:
            InvalidInput: Code `invalid_engine_address`.
        """
        front = FrontProcess()
        pool = cls(
            {
                address: open_engine(settings, address, front=front, store=store)
                for address in settings.engine_addresses
            }
        )
        if any(isinstance(engine, VllmEngine) for engine in pool.engines.values()):
            pool._front = front
        return pool

    async def aclose(self) -> None:
        """Close the connections to all engines."""
        for engine in self.engines.values():
            if isinstance(engine, RemoteEngine | VllmEngine):
                await engine.aclose()
        if self._front is not None:
            await self._front.aclose()

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request on the best engine that can be reached; see `Engine.generate`."""
        key = request.adapter.digest if request.adapter else request.request_id

        async def ask(address: str) -> EventStream:
            self._in_flight[address] += 1
            try:
                events = await self.engines[address].generate(request)
            except BaseException:
                self._in_flight[address] -= 1
                raise
            return _CountedStream(events, lambda: self._ended(address))

        return await self._first_willing(self._unloaded_first(self.ranked(key)), ask)

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident where its requests will go; see `Engine.load`."""
        return await self._first_willing(
            self.ranked(adapter.digest),
            lambda address: self.engines[address].load(base_model, adapter, keep=keep),
        )

    async def unload(self, digest: str) -> int:
        """Forget an adapter everywhere; see `Engine.unload`. Engines out of reach are left out."""
        return sum(await self._ask_all(lambda engine: engine.unload(digest)))

    async def release(self, digest: str) -> bool:
        """Keep an adapter no longer anywhere; see `Engine.release`."""
        return any(await self._ask_all(lambda engine: engine.release(digest)))

    async def status(self) -> EngineStatus:
        """Return the sum over the engines that can be reached; see `Engine.status`."""
        if self._front is not None:
            # It imports for seconds; the API asks for the status long before the first prompt.
            await self._front.start()
        return _sum(await self._ask_all(lambda engine: engine.status()))

    def ranked(self, key: str) -> list[str]:
        """Return all addresses, the best one for `key` first."""
        return sorted(self.engines, key=lambda address: _weight(address, key), reverse=True)

    def _unloaded_first(self, ranked: list[str]) -> list[str]:
        """Move the engines that have more than their share to the end."""
        total = self._in_flight.total() + 1
        bound = max(_LIGHT_LOAD, math.ceil(_LOAD_FACTOR * total / len(ranked)))
        return sorted(ranked, key=lambda address: self._in_flight[address] >= bound)

    def _ended(self, address: str) -> None:
        self._in_flight[address] -= 1

    async def _first_willing(
        self, addresses: Sequence[str], ask: Callable[[str], Awaitable[T]]
    ) -> T:
        *better, last = addresses
        for address in better:
            try:
                return await ask(address)
            except (Unavailable, Conflict) as error:
                if error.code not in _ELSEWHERE:
                    raise
        return await ask(last)

    async def _ask_all(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        async def outcome(engine: Engine) -> T | Unavailable:
            try:
                return await ask(engine)
            except Unavailable as error:
                return error

        outcomes = await asyncio.gather(*(outcome(engine) for engine in self.engines.values()))
        answers = [answer for answer in outcomes if not isinstance(answer, Unavailable)]
        if not answers:
            raise next(answer for answer in outcomes if isinstance(answer, Unavailable))
        return answers


class _CountedStream:
    """A stream that tells once when it has ended or was closed."""

    def __init__(self, events: EventStream, on_end: Callable[[], None]) -> None:
        self._events = events
        self._on_end: Callable[[], None] | None = on_end

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        try:
            event = await anext(self._events)
        except BaseException:
            self._tell()
            raise
        if isinstance(event, Done | Failed):
            self._tell()
        return event

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        self._tell()
        await self._events.aclose()

    def _tell(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()


def _weight(address: str, key: str) -> bytes:
    return hashlib.sha256(f"{address}\n{key}".encode()).digest()


def _sum(statuses: Sequence[EngineStatus]) -> EngineStatus:
    precision: dict[str, str] = {}
    for status in statuses:
        precision |= status.precision
    # All whole numbers of a status are counts and sizes.
    counts = {
        name: sum(getattr(status, name) for status in statuses)
        for name, field in EngineStatus.model_fields.items()
        if field.annotation is int
    }
    return EngineStatus(
        ready=any(status.ready for status in statuses),
        device=", ".join(sorted({status.device for status in statuses if status.ready})),
        base_models=sorted({digest for status in statuses for digest in status.base_models}),
        precision=precision,
        adapters=[adapter for status in statuses for adapter in status.adapters],
        evicted=[adapter for status in statuses for adapter in status.evicted],
        warnings=sorted({warning for status in statuses for warning in status.warnings}),
        **counts,
    )

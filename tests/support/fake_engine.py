"""An Engine without a model: it answers with an echo, deterministically and at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from core.errors import Conflict, InvalidInput, TunesmithError, to_wire
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Delta,
    Done,
    EngineEvent,
    EngineStatus,
    EventStream,
    Failed,
    Finished,
    GenerateRequest,
    ResidentAdapter,
    Started,
    Timings,
    TokenLogprob,
)

CONTEXT_LENGTH = 512


class FakeEngine:
    """Keeps the promises of `core.inference.engine.Engine` towards the API.

    An answer's tokens are the words of the prompt's last text, behind the first eight digits of the
    adapter's digest, or `base`. A prompt that begins with `FAIL` breaks off after the first token,
    one that begins with `CRASH` does so with an error that is the engine's own fault.

    Attributes:
        refusals: Digest → error that loading it raises.
        unavailable: If set, every call raises it.
        locate_adapter: Asked for the files of an adapter that is loaded.
        gate: Every token waits for it; cleared, from any thread, it holds requests.
        cancelled: Ids of the requests that were closed before they were done.
    """

    def __init__(self) -> None:
        self.refusals: dict[str, TunesmithError] = {}
        self.unavailable: TunesmithError | None = None
        self.locate_adapter: Callable[[str], object] = lambda digest: None
        self.gate = threading.Event()
        self.gate.set()
        self.cancelled: list[str] = []
        self.requests: list[GenerateRequest] = []
        self._resident: dict[str, ResidentAdapter] = {}
        self._loads = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request; see `Engine`."""
        self._check_available()
        self.requests.append(request)
        text = request.messages[-1].content if request.messages else request.prompt or ""
        prompt_tokens = len(text.split())
        if prompt_tokens + request.sampling.max_new_tokens > CONTEXT_LENGTH:
            raise InvalidInput(
                "the prompt and max_new_tokens do not fit the context",
                code="context_length_exceeded",
                field="prompt" if request.prompt is not None else "messages",
            )
        if request.adapter is not None:
            await self.load(request.base_model, request.adapter)
        return self._events(request, text, prompt_tokens)

    async def forward(self, request: GenerateRequest, put: Callable[[EngineEvent], None]) -> None:
        """Answer a request; see `core.inference.local_engine.LocalEngine.forward`."""
        async with aclosing(await self.generate(request)) as events:
            async for event in events:
                put(event)

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident; see `Engine`."""
        self._check_available()
        if adapter.digest in self.refusals:
            raise self.refusals[adapter.digest]
        if adapter.digest not in self._resident:
            self.locate_adapter(adapter.digest)
            self._loads += 1
            self._resident[adapter.digest] = ResidentAdapter(
                digest=adapter.digest,
                base_digest=base_model.digest,
                bytes=1000,
                hits=0,
                load_ms=1.0,
                last_used_seconds_ago=0.0,
            )
        if keep:
            kept = self._resident[adapter.digest].model_copy(update={"kept": True})
            self._resident[adapter.digest] = kept
        return self._resident[adapter.digest]

    async def unload(self, digest: str) -> int:
        """Forget an adapter; see `Engine`."""
        self._check_available()
        return 1000 if self._resident.pop(digest, None) is not None else 0

    async def release(self, digest: str) -> bool:
        """Keep an adapter no longer; see `Engine`."""
        self._check_available()
        found = self._resident.get(digest)
        if found is None or not found.kept:
            return False
        self._resident[digest] = found.model_copy(update={"kept": False})
        return True

    async def status(self) -> EngineStatus:
        """Return residency and counters; see `Engine`."""
        self._check_available()
        return EngineStatus(
            ready=True,
            device="cpu",
            base_models=sorted({entry.base_digest for entry in self._resident.values()}),
            precision={},
            adapters=list(self._resident.values()),
            running=0,
            waiting=0,
            loads=self._loads,
            evictions=0,
            load_failures=len(self.refusals),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            resident_bytes=1000 * len(self._resident),
        )

    def _check_available(self) -> None:
        if self.unavailable is not None:
            raise self.unavailable

    async def _events(
        self, request: GenerateRequest, text: str, prompt_tokens: int
    ) -> AsyncGenerator[EngineEvent, None]:
        digest = request.adapter.digest if request.adapter else None
        sampling = request.sampling
        words = [digest[:8] if digest else "base", *text.split()][: sampling.max_new_tokens]
        reason = "length" if len(words) == sampling.max_new_tokens else "stop"
        done = False
        try:
            yield Started(
                prompt_tokens=prompt_tokens,
                base_digest=request.base_model.digest,
                adapter_digest=digest,
                precision="float32",
            )
            for index in range(sampling.n):
                for position, word in enumerate(words):
                    while not self.gate.is_set():
                        await asyncio.sleep(0.01)
                    if position == 1 and word in ("FAIL", "CRASH"):
                        done = True
                        yield Failed(error=to_wire(_failure(word)))
                        return
                    token = word if position == 0 else f" {word}"
                    top = [(position, token, -0.5)] * (sampling.logprobs or 0)
                    entry = TokenLogprob(token=token, token_id=position, logprob=-0.5, top=top)
                    logprobs = [entry] if sampling.logprobs is not None else []
                    yield Delta(index=index, text=token, logprobs=logprobs)
                yield Finished(index=index, finish_reason=reason, completion_tokens=len(words))
            completion_tokens = len(words) * sampling.n
            self._prompt_tokens += prompt_tokens
            self._completion_tokens += completion_tokens
            done = True
            yield Done(
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                timings=Timings(queue_ms=0, load_ms=0, first_token_ms=1, total_ms=2),
            )
        finally:
            if not done:
                self.cancelled.append(request.request_id)


def _failure(word: str) -> TunesmithError:
    if word == "FAIL":
        return Conflict("the device was lost", code="device_lost")
    return TunesmithError("secret internals", code="internal_error")

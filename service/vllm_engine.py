"""A vLLM server as an engine: see `core.inference.engine.Engine`, and docs/serving.md.

Owns which adapters this process has loaded there, under names made of their digests, and the order
of what a request needs: a turn, the adapter through its gates, the prompt as token ids. What the
server then computes it computes by tokens alone; chat templates are applied on this side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx2

from core.errors import Unavailable
from core.inference.budgets import Budgets
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    EngineStatus,
    EventStream,
    GenerateRequest,
    ResidentAdapter,
    Started,
    too_late,
)
from core.memory_limits import usable_memory_bytes
from service.vllm_engine_adapters import Hold, VllmAdapters, name_of
from service.vllm_engine_base import ServedBases
from service.vllm_engine_fields import completion_body
from service.vllm_engine_front import FrontProcess
from service.vllm_engine_http import ModelCard, ModelMissing, VllmServer, parse_vllm_address
from service.vllm_engine_plain import PlainModels
from service.vllm_engine_stream import Clock, Totals, VllmStream
from service.vllm_engine_turns import Turns

_UNLIMITED_CONTEXT = 2**31


class VllmEngine:
    """Speaks to one vLLM server; used in one event loop.

    Args:
        address: `vllm+http://HOST:PORT` or `vllm+https://HOST:PORT`.
        locate_adapter: Digest → directory of its files, under the path that the server sees, too.
        front: Renders prompts and checks adapters.
        api_key: What the server was given as `--api-key`.
        precision: What answers say of the weights' precision.
        max_adapters: Adapters that are loaded at a time.
        adapter_bytes: What their files may take together; 0 is an eighth of this machine's memory.
        max_rows: Answers that are computed at a time.
        max_waiting: Requests that may wait; further ones are refused.
        timeout_seconds: Longest silence of the server while it works on a request.
        neutral_root: As `PlainModels` has it.
    """

    def __init__(
        self,
        address: str,
        *,
        locate_adapter: Callable[[str], Path],
        front: FrontProcess,
        api_key: str = "",
        precision: str = "unknown",
        max_adapters: int = 16,
        adapter_bytes: int = 0,
        max_rows: int = 256,
        max_waiting: int = 64,
        timeout_seconds: float = 600.0,
        neutral_root: Path | None = None,
    ) -> None:
        self.address = address
        url = parse_vllm_address(address)
        self._server = VllmServer(url, api_key=api_key, timeout_seconds=timeout_seconds)
        self._front = front
        self._precision = precision
        self._bases = ServedBases()
        self._plain = PlainModels(self._server, front, neutral_root)
        self._turns = Turns(max_rows, max_waiting)
        limit = Budgets(adapters=adapter_bytes).within(usable_memory_bytes()).adapters
        self._adapters = VllmAdapters(
            self._server, self._bases, self._plain, front, locate_adapter, max_adapters, limit
        )
        self._prompt_tokens = 0
        self._reused_tokens = 0
        self._completion_tokens = 0

    async def aclose(self) -> None:
        """Close all connections; what is loaded at the server stays there."""
        self._adapters.close()
        await self._server.aclose()

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request; see `Engine.generate`.

        Raises:
            InvalidInput: Also code `not_honoured` or `engine_refused`: the server cannot do, or
                does not take, what a field asks for.
            Conflict: Also code `base_model_not_served`.
        """
        clock = Clock(request.deadline_seconds)
        try:
            async with asyncio.timeout(clock.remaining()):
                return await self._in_turn(request, clock)
        except TimeoutError as error:
            raise too_late() from error

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident; see `Engine.load`."""
        hold = await self._adapters.hold(base_model, adapter)
        try:
            listed = _adapter_names(await self._server.models())
            await self._adapters.ensure_listed(base_model, hold.key, listed)
            if keep:
                self._adapters.bank.keep(hold.key)
            return self._adapters.bank.describe(hold.key)
        finally:
            self._adapters.let_go(hold)

    async def unload(self, digest: str) -> int:
        """Forget an adapter; see `Engine.unload`.

        The server gives the memory back when it needs it for another adapter.
        """
        return await self._adapters.unload(digest)

    async def release(self, digest: str) -> bool:
        """Keep an adapter no longer; see `Engine.release`."""
        return self._adapters.bank.release(digest)

    async def status(self) -> EngineStatus:
        """Return residency and what this process has asked for; see `Engine.status`."""
        listed = _adapter_names(await self._server.models())
        bank = self._adapters.bank
        found = [bank.warning(), self._unchecked()]
        return EngineStatus(
            ready=True,
            device=f"vLLM {await self._server.version()}",
            base_models=list(self._bases.found),
            precision=dict.fromkeys(self._bases.found, self._precision),
            # What a restart of the server has taken away is not resident.
            adapters=[a for a in bank.residents() if name_of(a.digest) in listed],
            evicted=bank.evicted(),
            warnings=[warning for warning in found if warning],
            running=self._turns.running,
            waiting=self._turns.waiting,
            loads=bank.loads + self._adapters.reloads,
            evictions=bank.evictions,
            load_failures=bank.load_failures,
            prompt_tokens=self._prompt_tokens,
            reused_prompt_tokens=self._reused_tokens,
            completion_tokens=self._completion_tokens,
            resident_bytes=bank.bytes,
            resident_limit_bytes=bank.max_bytes,
        )

    def _unchecked(self) -> str:
        return (
            f"{self.address} is a vLLM server: it does not tell which modules an adapter changes, "
            "so that its effect is checked by the log-probabilities of its golden tokens alone; "
            f"and it does not tell its precision, {self._precision!r} is what was configured."
        )

    async def _in_turn(self, request: GenerateRequest, clock: Clock) -> EventStream:
        rows = request.sampling.n
        await self._turns.take(request.project_id, rows)
        clock.admitted = time.monotonic()
        hold: Hold | None = None

        def end(totals: Totals | None = None) -> None:
            self._turns.give(request.project_id, rows)
            if hold is not None:
                self._adapters.let_go(hold)
            if totals is not None:
                self._prompt_tokens += totals.prompt
                self._reused_tokens += totals.reused
                self._completion_tokens += totals.completion

        try:
            await self._front.ask("check_base", base=request.base_model.model_dump())
            if request.adapter is not None:
                hold = await self._adapters.hold(request.base_model, request.adapter)
            # Asked after that, and each time: it may have been restarted, with another model.
            cards = await self._server.models()
            card = await self._bases.find(cards, request.base_model)
            model = await self._ensure(request, hold, card, _adapter_names(cards))
            clock.loaded = time.monotonic()
            return await self._start(request, model, card, hold, clock, end)
        except BaseException:
            end()
            raise

    async def _ensure(
        self, request: GenerateRequest, hold: Hold | None, card: ModelCard, listed: Collection[str]
    ) -> str:
        """Return the server's name of what computes a request, loading it where it is missing."""
        if hold is None:
            return await self._plain.ensure(request.base_model, card.id, listed)
        await self._adapters.ensure_listed(request.base_model, hold.key, listed)
        return name_of(hold.key.digest)

    async def _start(
        self,
        request: GenerateRequest,
        model: str,
        card: ModelCard,
        hold: Hold | None,
        clock: Clock,
        on_end: Callable[[Totals], None],
    ) -> EventStream:
        base, adapter = request.base_model, request.adapter
        prompt = await self._front.ask(
            "encode",
            base=base.model_dump(),
            request=request.model_dump(mode="json", exclude_unset=True),
            context_length=card.max_model_len or _UNLIMITED_CONTEXT,
            directory=await self._adapters.directory(adapter.digest) if adapter else None,
        )
        texts = await self._front.texts.get(base)
        body = completion_body(
            model=model,
            ids=prompt["ids"],
            max_new_tokens=prompt["max_new_tokens"],
            end_ids=prompt["end_ids"],
            sampling=request.sampling,
            cache_salt=request.project_id,
        )
        try:
            response = await self._server.stream(body)
        except ModelMissing:
            # Restarted, or unloaded by another process, in this very moment.
            await self._ensure(request, hold, card, ())
            response = await self._again(body)

        started = Started(
            prompt_tokens=len(prompt["ids"]),
            base_digest=base.digest,
            adapter_digest=adapter.digest if adapter else None,
            precision=self._precision,
        )
        return VllmStream(
            response,
            started=started,
            answers=texts.open_answers(request, prompt),
            logprobs=request.sampling.logprobs,
            clock=clock,
            on_end=on_end,
        )

    async def _again(self, body: dict[str, Any]) -> httpx2.Response:
        try:
            return await self._server.stream(body)
        except ModelMissing as error:
            raise Unavailable(
                "the vLLM server forgets models as fast as they are loaded",
                code="engine_unavailable",
                hint="Let no two services use it with the same adapters.",
            ) from error


def _adapter_names(cards: list[ModelCard]) -> set[str]:
    return {card.id for card in cards if card.parent is not None}

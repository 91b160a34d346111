"""The events of one request to a vLLM server, from its server-sent events.

Owns what the server's chunks mean: of them it takes token ids and log-probabilities. Texts, stop
strings and ends are those of our own engine. Knows nothing of how a request came to be sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2

from core.errors import TunesmithError, to_wire
from core.inference.engine import (
    Done,
    EngineEvent,
    Failed,
    FinishReason,
    Started,
    Timings,
    engine_lost,
    too_late,
)
from core.inference.generation import Answer, TokenChoice

_TOKEN_PREFIX = "token_id:"
_END = "[DONE]"


@dataclass
class Clock:
    """When a request reached which stage, in monotonic seconds."""

    deadline_seconds: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    loaded: float = 0.0
    first_token: float = 0.0

    def remaining(self) -> float | None:
        """Return the seconds until the deadline; `None` without one."""
        if self.deadline_seconds is None:
            return None
        return max(0.0, self.submitted + self.deadline_seconds - time.monotonic())

    def timings(self) -> Timings:
        """Return what the request took until now."""
        now = time.monotonic()
        return Timings(
            queue_ms=(self.admitted - self.submitted) * 1000,
            load_ms=(self.loaded - self.admitted) * 1000,
            first_token_ms=((self.first_token or now) - self.submitted) * 1000,
            total_ms=(now - self.submitted) * 1000,
        )


@dataclass(frozen=True)
class Totals:
    """Tokens of a request that ended or was left.

    Attributes:
        prompt: Of its prompt.
        reused: Those of them that the server took from its prefix cache, as far as it tells.
        completion: Of all its answers.
    """

    prompt: int
    reused: int
    completion: int


class VllmStream:
    """See `core.inference.engine.EventStream`.

    Args:
        response: Open, with status 200.
        started: The first event.
        answers: That grow by it.
        logprobs: How many tokens are told beside each one; `None` for none at all.
        clock: Of the request.
        on_end: Called once, when the request has ended or was left.
    """

    def __init__(
        self,
        response: httpx2.Response,
        *,
        started: Started,
        answers: Sequence[Answer],
        logprobs: int | None,
        clock: Clock,
        on_end: Callable[[Totals], None],
    ) -> None:
        self._response = response
        self._frames = _frames(response)
        self._answers = answers
        self._logprobs = logprobs
        self._clock = clock
        self._on_end = on_end
        self._prompt_tokens = started.prompt_tokens
        self._reused_tokens = 0
        self._unfinished = set(range(len(answers)))
        self._events: deque[EngineEvent] = deque([started])
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        if self._ended:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._clock.remaining() if not self._events else None):
                while not self._events:
                    await self._read()
        except TimeoutError:
            self._events.append(Failed(error=to_wire(too_late())))
        except TunesmithError as error:
            self._events.append(Failed(error=to_wire(error)))
        except (httpx2.TransportError, httpx2.StreamError, ValueError, LookupError, TypeError):
            self._events.append(Failed(error=to_wire(engine_lost())))
        except asyncio.CancelledError:
            await self.aclose()
            raise
        event = self._events.popleft()
        if isinstance(event, Done | Failed):
            await self.aclose()
        return event

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._ended:
            self._ended = True
            completion = sum(answer.completion_tokens for answer in self._answers)
            self._on_end(Totals(self._prompt_tokens, self._reused_tokens, completion))
        await self._response.aclose()

    async def _read(self) -> None:
        """Turn one frame of the server into events.

        Raises:
            TunesmithError: The server says that it failed, or ended without saying so.
        """
        frame = await anext(self._frames, None)
        if frame is None or "error" in frame:
            # The server's own words may hold what was asked; its log has them.
            raise engine_lost()
        for choice in frame["choices"]:
            self._take(self._answers[choice["index"]], choice)
        if all(answer.finish_reason is not None for answer in self._answers):
            if not self._unfinished:
                # To its end, so that the connection can be used again.
                async for last in self._frames:
                    self._note_usage(last.get("usage"))
            self._finish()

    def _note_usage(self, usage: dict[str, Any] | None) -> None:
        details = (usage or {}).get("prompt_tokens_details") or {}
        self._reused_tokens = details.get("cached_tokens") or self._reused_tokens

    def _take(self, answer: Answer, choice: dict[str, Any]) -> None:
        # The text that comes with the tokens is the server's; the answer makes its own.
        chosen, reason = self._chosen(choice), _reason(choice.get("finish_reason"))
        if chosen and not self._clock.first_token:
            self._clock.first_token = time.monotonic()
        for token in chosen:
            if answer.finish_reason is None:
                self._events += answer.push(token)
        if reason is not None:
            self._unfinished.discard(answer.index)
            if answer.finish_reason is None:
                self._events += answer.end(reason)

    def _finish(self) -> None:
        self._events.append(
            Done(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=sum(answer.completion_tokens for answer in self._answers),
                timings=self._clock.timings(),
            )
        )

    def _chosen(self, choice: dict[str, Any]) -> list[TokenChoice]:
        ids = choice.get("token_ids") or []
        if self._logprobs is None:
            return [TokenChoice(id_) for id_ in ids]
        if not ids:
            return []
        told = choice["logprobs"]
        return [
            # Besides the best, the server names the chosen token.
            TokenChoice(id_, value, _best(top)[: self._logprobs])
            for id_, value, top in zip(
                ids, told["token_logprobs"], told["top_logprobs"], strict=True
            )
        ]


async def _frames(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield what the server sends."""
    pending = bytearray()
    # By bytes: what httpx calls lines also ends at characters that occur inside JSON strings.
    async for chunk in response.aiter_bytes():
        pending += chunk
        while (end := pending.find(b"\n")) >= 0:
            line = pending[:end].decode("utf-8").strip()
            del pending[: end + 1]
            # Besides data there are blank lines, and comments that keep the connection.
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data and data != _END:
                yield json.loads(data)


def _reason(stated: str | None) -> FinishReason | None:
    match stated:
        case None:
            return None
        case "stop" | "length":
            return stated
        case _:
            # Such as `abort`, when the server is shut down.
            raise engine_lost()


def _best(top: dict[str, float]) -> list[tuple[int, float]]:
    entries = [(int(name.removeprefix(_TOKEN_PREFIX)), value) for name, value in top.items()]
    return sorted(entries, key=lambda entry: (-entry[1], entry[0]))

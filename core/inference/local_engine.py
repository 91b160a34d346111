"""The Engine of this process: the engine thread behind the Protocol, and the streams it feeds.

Owns the bridge between asyncio and the thread. Knows no torch; that comes with the runner.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from core.errors import TunesmithError, Unavailable
from core.inference.budgets import Budgets
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Done,
    EngineEvent,
    EngineStatus,
    EventStream,
    Failed,
    GenerateRequest,
    ResidentAdapter,
)
from core.inference.engine_thread import EngineThread
from core.inference.work import Outcome, Work

if TYPE_CHECKING:
    from core.inference.model_runner import ModelRunner

_MAX_ROWS = 16


class LocalEngine:
    """Computes answers in a thread of this process; see `core.inference.engine.Engine`.

    Args:
        make_runner: Called in the engine thread; imports the model libraries there.
        locate_adapter: Digest → directory of its files; may download, so other threads call it.
        max_adapters: Adapters in memory.
        max_waiting: Requests that may wait; further ones are refused.
        max_rows: Answers that may be computed at a time.
        budgets: Memory for what.
        on_crash: Called in the engine thread when it ends by an error of its own.
    """

    def __init__(
        self,
        make_runner: Callable[[], ModelRunner],
        locate_adapter: Callable[[str], Path],
        *,
        max_adapters: int = 16,
        max_waiting: int = 64,
        max_rows: int = _MAX_ROWS,
        budgets: Budgets = Budgets(),
        on_crash: Callable[[], None] = lambda: None,
    ) -> None:
        self._outbox = _Outbox()
        self._thread = EngineThread(
            make_runner,
            locate_adapter,
            self._outbox.send,
            max_adapters=max_adapters,
            max_waiting=max_waiting,
            max_rows=max_rows,
            budgets=budgets,
            on_crash=on_crash,
        )

    def start(self) -> Self:
        """Start the engine thread and return at once; `status` tells when it is ready."""
        self._thread.start()
        return self

    @property
    def ready(self) -> threading.Event:
        """Set while the engine takes requests."""
        return self._thread.ready

    def stop(self) -> None:
        """Stop after the present step; what is not done fails. Blocks until the thread ended."""
        self._thread.stop()

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request; see `Engine.generate`."""
        stream = _Stream(self._thread, self._outbox)
        self._check_ready()
        await stream.open(Work(request.base_model, request.adapter, request, stream.deliver))
        return stream

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident; see `Engine.load`."""
        stream = _Stream(self._thread, self._outbox)
        self._check_ready()
        loaded = await stream.open(Work(base_model, adapter, None, stream.deliver, keep=keep))
        assert isinstance(loaded, ResidentAdapter)
        return loaded

    async def unload(self, digest: str) -> int:
        """Forget an adapter; see `Engine.unload`."""
        self._check_ready()
        return await asyncio.wrap_future(self._thread.call(lambda: self._thread.unload(digest)))

    async def release(self, digest: str) -> bool:
        """Keep an adapter no longer; see `Engine.release`."""
        self._check_ready()
        return await asyncio.wrap_future(self._thread.call(lambda: self._thread.release(digest)))

    async def status(self) -> EngineStatus:
        """Return residency and counters; see `Engine.status`."""
        if not self.ready.is_set() and not self._thread.ended.is_set():
            return EngineStatus(
                ready=False,
                device="",
                base_models=[],
                precision={},
                adapters=[],
                running=0,
                waiting=0,
                loads=0,
                evictions=0,
                load_failures=0,
                prompt_tokens=0,
                completion_tokens=0,
                resident_bytes=0,
            )
        return await asyncio.wrap_future(self._thread.call(self._thread.status))

    def _check_ready(self) -> None:
        if not self.ready.is_set():
            raise Unavailable(
                "the engine is starting"
                if not self._thread.ended.is_set()
                else "the engine has stopped",
                code="engine_unavailable",
                retry_after_seconds=2,
            )


class _Outbox:
    """Outcomes on their way out of the engine thread, one journey for all of a pass."""

    def __init__(self) -> None:
        self._outcomes: dict[_Stream, list[Outcome]] = {}

    def put(self, stream: _Stream, outcome: Outcome) -> None:
        """Take an outcome; called in the engine thread."""
        self._outcomes.setdefault(stream, []).append(outcome)

    def send(self) -> None:
        """Hand everything to the event loops; called in the engine thread."""
        outcomes, self._outcomes = self._outcomes, {}
        by_loop: dict[asyncio.AbstractEventLoop, dict[_Stream, list[Outcome]]] = {}
        for stream, own in outcomes.items():
            by_loop.setdefault(stream.loop, {})[stream] = own
        for loop, streams in by_loop.items():
            try:
                # Waking a loop costs more than handing it a few more outcomes.
                loop.call_soon_threadsafe(_take_all, streams)
            except RuntimeError:
                # The loop is closed: nobody listens any more.
                for stream in streams:
                    stream.abandon()


def _take_all(streams: dict[_Stream, list[Outcome]]) -> None:
    for stream, outcomes in streams.items():
        stream.take(outcomes)


class _Stream:
    """The events of one request, from the engine thread to one event loop."""

    def __init__(self, thread: EngineThread, outbox: _Outbox) -> None:
        self._thread = thread
        self._outbox = outbox
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Outcome] = asyncio.Queue()
        # Until it has ended. The work refers to the stream, and two that hold each other would
        # stay, with all the text between them, until a collection finds them.
        self._work: Work | None = None
        self._first: Outcome | None = None

    async def open(self, work: Work) -> Outcome:
        """Have the engine take a request; return the first outcome.

        Args:
            work: The request, which delivers to this stream.

        Raises:
            TunesmithError: The engine refuses it, or its first outcome is an error.
        """
        self._work = work
        try:
            await asyncio.wrap_future(self._thread.call(lambda: self._thread.submit(work)))
            first = await self._next()
        except BaseException:
            self.cancel()
            raise
        if isinstance(first, TunesmithError):
            raise first
        self._first = first
        return first

    def deliver(self, outcome: Outcome) -> None:
        """Take an outcome; called in the engine thread."""
        self._outbox.put(self, outcome)

    def take(self, outcomes: Iterable[Outcome]) -> None:
        """Have outcomes ready for whoever reads; called in the event loop."""
        for outcome in outcomes:
            self._queue.put_nowait(outcome)

    def abandon(self) -> None:
        """Note that nobody reads any more; called in the engine thread."""
        if self._work is not None:
            self._work.cancelled = True

    def cancel(self) -> None:
        """Have the engine forget the request, unless it has ended."""
        work, self._work = self._work, None
        if work is not None:
            self._thread.call(lambda: self._thread.cancel(work))

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        self._first = None
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        outcome, self._first = self._first, None
        if outcome is None:
            if self._work is None:
                raise StopAsyncIteration
            try:
                outcome = await self._next()
            except asyncio.CancelledError:
                self.cancel()
                raise
        assert not isinstance(outcome, TunesmithError | ResidentAdapter)
        return outcome

    async def _next(self) -> Outcome:
        outcome = await self._queue.get()
        if isinstance(outcome, Done | Failed | ResidentAdapter | TunesmithError):
            self._work = None
        return outcome

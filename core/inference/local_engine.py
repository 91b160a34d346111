"""The Engine of this process: the engine thread behind the Protocol, and the streams it feeds.

Owns the bridge between asyncio and the thread. Knows no torch; that comes with the runner.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
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

    async def forward(self, request: GenerateRequest, put: Callable[[EngineEvent], None]) -> None:
        """Answer a request, and return when it has ended; cancelling this cancels it.

        Args:
            request: The request.
            put: Takes each event, in the event loop; all those of a pass without a pause. What it
                raises ends the request.

        Raises:
            TunesmithError: It is refused before its first event, see `Engine.generate`.
        """
        forwarder = _Forwarder(self._thread, self._outbox, put)
        self._check_ready()
        await forwarder.run(Work(request.base_model, request.adapter, request, forwarder.deliver))

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
        self._outcomes: dict[_Receiver, list[Outcome]] = {}

    def put(self, receiver: _Receiver, outcome: Outcome) -> None:
        """Take an outcome; called in the engine thread."""
        self._outcomes.setdefault(receiver, []).append(outcome)

    def send(self) -> None:
        """Hand everything to the event loops; called in the engine thread."""
        outcomes, self._outcomes = self._outcomes, {}
        by_loop: dict[asyncio.AbstractEventLoop, dict[_Receiver, list[Outcome]]] = {}
        for receiver, own in outcomes.items():
            by_loop.setdefault(receiver.loop, {})[receiver] = own
        for loop, receivers in by_loop.items():
            try:
                # Waking a loop costs more than handing it a few more outcomes.
                loop.call_soon_threadsafe(_take_all, receivers)
            except RuntimeError:
                # The loop is closed: nobody listens any more.
                for receiver in receivers:
                    receiver.abandon()


def _take_all(receivers: dict[_Receiver, list[Outcome]]) -> None:
    for receiver, outcomes in receivers.items():
        receiver.take(outcomes)


class _Receiver:
    """Where the outcomes of one request come from the engine thread to one event loop."""

    def __init__(self, thread: EngineThread, outbox: _Outbox) -> None:
        self._thread = thread
        self._outbox = outbox
        self.loop = asyncio.get_running_loop()
        # Until it has ended. The work refers to the receiver, and two that hold each other would
        # stay, with all the text between them, until a collection finds them.
        self._work: Work | None = None

    async def submit(self, work: Work) -> None:
        """Have the engine take a request, which delivers to this receiver.

        Raises:
            TunesmithError: The engine refuses it.
        """
        self._work = work
        await asyncio.wrap_future(self._thread.call(lambda: self._thread.submit(work)))

    def deliver(self, outcome: Outcome) -> None:
        """Take an outcome; called in the engine thread."""
        self._outbox.put(self, outcome)

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcomes of a pass; called in the event loop."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Note that nobody reads any more; called in the engine thread."""
        if self._work is not None:
            self._work.cancelled = True

    def cancel(self) -> None:
        """Have the engine forget the request, unless it has ended."""
        work, self._work = self._work, None
        if work is not None:
            self._thread.call(lambda: self._thread.cancel(work))

    def note_end(self, outcome: Outcome) -> bool:
        """Tell whether an outcome is the request's last one, and let go of the request then."""
        ends = isinstance(outcome, Done | Failed | ResidentAdapter | TunesmithError)
        if ends:
            self._work = None
        return ends


class _Stream(_Receiver):
    """The events of one request for whoever asks for the next one."""

    def __init__(self, thread: EngineThread, outbox: _Outbox) -> None:
        super().__init__(thread, outbox)
        self._queue: asyncio.Queue[Outcome] = asyncio.Queue()
        self._first: Outcome | None = None

    async def open(self, work: Work) -> Outcome:
        """Have the engine take a request; return the first outcome.

        Raises:
            TunesmithError: The engine refuses it, or its first outcome is an error.
        """
        try:
            await self.submit(work)
            first = await self._next()
        except BaseException:
            self.cancel()
            raise
        if isinstance(first, TunesmithError):
            raise first
        self._first = first
        return first

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Have outcomes ready for whoever reads."""
        for outcome in outcomes:
            self._queue.put_nowait(outcome)

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
        self.note_end(outcome)
        return outcome


class _Forwarder(_Receiver):
    """Hands the events of one request on as they come, without waking anybody in between."""

    def __init__(
        self, thread: EngineThread, outbox: _Outbox, put: Callable[[EngineEvent], None]
    ) -> None:
        super().__init__(thread, outbox)
        self._put = put
        self._ended: asyncio.Future[None] = self.loop.create_future()

    async def run(self, work: Work) -> None:
        """Return when the request has ended; cancelling this cancels it.

        Raises:
            TunesmithError: The engine refuses it, or its first outcome is an error.
        """
        try:
            await self.submit(work)
            await self._ended
        finally:
            self.cancel()

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Hand events on, and note the end."""
        for outcome in outcomes:
            if self._ended.done():
                return
            if isinstance(outcome, TunesmithError):
                self._ended.set_exception(outcome)
            else:
                assert not isinstance(outcome, ResidentAdapter)
                self._hand_on(outcome)
            if self.note_end(outcome) and not self._ended.done():
                self._ended.set_result(None)

    def _hand_on(self, event: EngineEvent) -> None:
        try:
            self._put(event)
        except Exception as error:
            self._ended.set_exception(error)

"""The engine thread: it alone touches the model, the bank and the list of requests.

Owns admission in order of arrival, the stages a request passes (base model, adapter, prompt,
decoding) and the beat: all answers of a base model advance by one token in one step, whatever their
adapters, and between two steps one prompt is read a piece further. Fetching and reading files, and
tokenising, happen in small pools beside it. Knows no torch and no asyncio: the runner computes, and
each piece of work says where its events go.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import Conflict, TunesmithError, Unavailable, from_wire, to_wire
from core.inference.adapter_bank import AdapterBank, AdapterKey
from core.inference.engine import EngineStatus
from core.inference.prefill_pace import PrefillPace
from core.inference.prompts import EncodedPrompt
from core.inference.work import Line, Work
from core.logging import get_logger

if TYPE_CHECKING:
    from core.inference.transformers_runner import TransformersRunner

_POOL_THREADS = 4

T = TypeVar("T")

log = get_logger(__name__)


class EngineThread:
    """Runs all work of one device; other threads reach its methods through `call`.

    Args:
        make_runner: Called in the thread; imports the model libraries.
        locate_adapter: Digest → directory of its files; may download, so other threads call it.
        max_adapters: Adapters in memory.
        max_waiting: Requests that may wait; further ones are refused.
        max_rows: Answers that may be computed at a time.
        on_crash: Called when the thread ends by an error of its own.
    """

    def __init__(
        self,
        make_runner: Callable[[], TransformersRunner],
        locate_adapter: Callable[[str], Path],
        *,
        max_adapters: int,
        max_waiting: int,
        max_rows: int,
        on_crash: Callable[[], None],
    ) -> None:
        self._make_runner = make_runner
        self._locate_adapter = locate_adapter
        self._max_waiting = max_waiting
        self._max_rows = max_rows
        self._on_crash = on_crash
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any] | None]] = (
            queue.SimpleQueue()
        )
        self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="engine-files")
        # Of their own: however long downloads take, prompts are encoded meanwhile.
        self._adapter_pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="engine-adapters")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._runner: TransformersRunner
        self._bank = AdapterBank(max_adapters, lambda key: self._runner.remove_adapter(key))

        self._waiting: deque[Work] = deque()
        self._admitted: list[Work] = []
        self._prefilling: deque[Work] = deque()
        self._decoding: list[Work] = []
        self._pace = PrefillPace()
        self._waiting_for_base: dict[str, list[Work]] = {}
        self._waiting_for_adapter: dict[AdapterKey, list[Work]] = {}
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self.ready = threading.Event()
        self.ended = threading.Event()

    def start(self) -> None:
        """Start the thread; `ready` is set once the runner is there."""
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the thread call `function` between two steps; safe from any thread.

        Returns:
            Its result or error; `Unavailable` when the thread has ended.
        """
        future: Future[T] = Future()
        self._inbox.put((function, future))
        if self.ended.is_set():
            self._refuse_calls()
        return future

    def stop(self) -> None:
        """End the thread after the present step; work that is not done fails."""

        def stop() -> None:
            self._stopping = True

        self.call(stop)
        self._thread.join()

    def submit(self, work: Work) -> None:
        """Take in a request.

        Raises:
            Conflict: Its adapter was refused a short while ago.
            Unavailable: Code `engine_full`.
        """
        failure = self._bank.recent_failure(work.key) if work.key else None
        if failure is not None:
            raise from_wire(to_wire(failure))
        if len(self._waiting) >= self._max_waiting:
            raise Unavailable(
                f"{len(self._waiting)} requests are waiting for the engine already",
                code="engine_full",
                retry_after_seconds=2,
                hint="Send the request again a little later.",
            )
        self._waiting.append(work)
        self._admit()

    def cancel(self, work: Work) -> None:
        """Stop computing for a request; one that is being prepared ends with that stage."""
        work.cancelled = True
        if work in self._waiting:
            self._waiting.remove(work)
        elif work in self._decoding or work in self._prefilling:
            self._end(work)

    def unload(self, digest: str) -> bool:
        """Evict an adapter; see `AdapterBank.unload`."""
        return self._bank.unload(digest)

    def status(self) -> EngineStatus:
        """Return residency and counters."""
        adapters = self._bank.residents()
        return EngineStatus(
            ready=True,
            device=str(self._runner.device),
            base_models=list(self._runner.bases),
            precision={d: base.precision for d, base in self._runner.bases.items()},
            adapters=adapters,
            running=len(self._admitted),
            waiting=len(self._waiting),
            loads=self._bank.loads,
            evictions=self._bank.evictions,
            load_failures=self._bank.load_failures,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            resident_bytes=sum(adapter.bytes for adapter in adapters),
        )

    def _run(self) -> None:
        crashed = False
        try:
            self._runner = self._make_runner()
            self.ready.set()
            while not self._stopping:
                self._take_commands()
                self._step()
        except BaseException:
            log.exception("engine_crashed")
            crashed = True
        finally:
            self.ready.clear()
            self.ended.set()
            for pool in (self._pool, self._adapter_pool):
                pool.shutdown(wait=False, cancel_futures=True)
            self._fail_everything()
            if crashed:
                self._on_crash()

    def _fail_everything(self) -> None:
        for work in [*self._waiting, *self._admitted]:
            work.fail(_stopped())
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        while True:
            try:
                _, future = self._inbox.get_nowait()
            except queue.Empty:
                return
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(_stopped())

    def _take_commands(self) -> None:
        if not (self._decoding or self._prefilling):
            _run_command(*self._inbox.get())
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            _run_command(*command)

    def _admit(self) -> None:
        """Start waiting work in order of arrival, as long as rows and adapter slots allow."""
        while self._waiting:
            work = self._waiting[0]
            rows = sum(admitted.rows for admitted in self._admitted)
            if rows and rows + work.rows > self._max_rows:
                return
            if work.key is not None and not self._bank.pin(work.key):
                return
            self._waiting.popleft()
            self._admitted.append(work)
            work.note_admitted()
            self._need_base(work)

    def _need_base(self, work: Work) -> None:
        digest = work.base_model.digest
        if digest in self._runner.bases:
            self._need_adapter(work)
            return
        waiters = self._waiting_for_base.setdefault(digest, [])
        waiters.append(work)
        if len(waiters) == 1:
            self._in_pool(
                self._pool,
                lambda: self._runner.load_base(work.base_model),
                lambda future: self._base_loaded(digest, future),
            )

    def _base_loaded(self, digest: str, future: Future[Any]) -> None:
        waiters = self._waiting_for_base.pop(digest)
        try:
            self._runner.bases[digest] = future.result()
        except Exception as error:
            for work in waiters:
                self._end(work, _deliberate(error))
            return
        log.info("base_model_loaded", base_digest=digest)
        for work in waiters:
            self._need_adapter(work)

    def _need_adapter(self, work: Work) -> None:
        key = work.key
        if key is None or self._bank.is_resident(key):
            self._need_prompt(work)
            return
        waiters = self._waiting_for_adapter.setdefault(key, [])
        waiters.append(work)
        if len(waiters) == 1:
            started = time.monotonic()
            self._in_pool(
                self._adapter_pool,
                lambda: self._runner.read_adapter(
                    key.base_digest, key.digest, self._locate_adapter(key.digest)
                ),
                lambda future: self._adapter_read(key, started, future),
            )

    def _adapter_read(self, key: AdapterKey, started: float, future: Future[Any]) -> None:
        waiters = self._waiting_for_adapter.pop(key)
        try:
            adapter = future.result()
            self._runner.bases[key.base_digest].insert(adapter)
        except Exception as problem:
            error = _deliberate(problem)
            self._bank.failed(key, error, remember=isinstance(error, Conflict))
            log.warning("adapter_refused", digest=key.digest, code=error.code)
            for work in waiters:
                self._end(work, error)
            return
        load_ms = (time.monotonic() - started) * 1000
        self._bank.loaded(key, bytes=adapter.weights.bytes, load_ms=load_ms)
        log.info("adapter_loaded", digest=key.digest, load_ms=round(load_ms, 1))
        for work in waiters:
            self._need_prompt(work)

    def _need_prompt(self, work: Work) -> None:
        work.note_loaded()
        request = work.request
        if work.cancelled:
            self._end(work)
        elif request is None:
            if work.key is not None:
                work.deliver(self._bank.describe(work.key))
            self._end(work)
        else:
            base = self._runner.bases[work.base_model.digest]
            encoder = base.encoder(work.adapter.digest if work.adapter else None)
            self._in_pool(
                self._pool,
                lambda: encoder.encode(request),
                lambda future: self._prompt_encoded(work, future),
            )

    def _prompt_encoded(self, work: Work, future: Future[EncodedPrompt]) -> None:
        if work.cancelled:
            self._end(work)
            return
        try:
            prompt = future.result()
            work.start(self._runner.bases[work.base_model.digest], prompt)
        except Exception as error:
            self._end(work, _deliberate(error))
            return
        self._prompt_tokens += len(prompt.ids)
        self._prefilling.append(work)

    def _step(self) -> None:
        """Give every answer a token and one prompt a piece: one beat of the engine."""
        for lines in self._by_base():
            self._decode(lines)
        if self._prefilling:
            self._prefill(self._prefilling.popleft())

    def _by_base(self) -> list[list[Line]]:
        lines: dict[int, list[Line]] = {}
        for work in self._decoding:
            lines.setdefault(id(work.base), []).extend(work.live_lines())
        return list(lines.values())

    def _decode(self, lines: list[Line]) -> None:
        base = lines[0].work.base
        started = time.monotonic()
        try:
            choices = base.decode_lines(lines)
        except Exception as error:
            if len(lines) == 1:
                self._end(lines[0].work, _deliberate(error))
                return
            # One of them is to blame, perhaps for too much memory; the others shall not pay for it.
            log.warning("step_failed", rows=len(lines), error=repr(error))
            for line in lines:
                if line.work in self._decoding:
                    self._decode([line])
            return
        self._pace.note_step(time.monotonic() - started)
        self._completion_tokens += len(lines)
        failed: dict[Work, TunesmithError] = {}
        for line, choice in zip(lines, choices, strict=True):
            if isinstance(choice, TunesmithError):
                failed[line.work] = choice
            elif line.work not in failed:
                line.work.push(line, choice)
        for work in {line.work: None for line in lines}:
            if work in failed or work.finished:
                self._end(work, failed.get(work))

    def _prefill(self, work: Work) -> None:
        piece = min(self._pace.piece(others_wait=bool(self._decoding)), work.prompt_left)
        started = time.monotonic()
        try:
            self._completion_tokens += work.prefill(piece)
        except Exception as error:
            self._end(work, _deliberate(error))
            return
        self._pace.note_piece(piece, time.monotonic() - started)
        if not work.prefilled:
            self._prefilling.append(work)
        elif work.finished:
            self._end(work)
        else:
            self._decoding.append(work)

    def _end(self, work: Work, error: TunesmithError | None = None) -> None:
        self._admitted.remove(work)
        for queued in (self._prefilling, self._decoding):
            if work in queued:
                queued.remove(work)
        work.close()
        if work.key is not None:
            self._bank.unpin(work.key)
        if error is not None:
            work.fail(error)
        self._admit()

    def _in_pool(
        self,
        pool: ThreadPoolExecutor,
        task: Callable[[], Any],
        then: Callable[[Future[Any]], None],
    ) -> None:
        future = pool.submit(task)
        future.add_done_callback(lambda done: self._inbox.put((lambda: then(done), None)))


def _run_command(function: Callable[[], Any], future: Future[Any] | None) -> None:
    if future is None:
        function()
    elif future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(_deliberate(error))


def _stopped() -> Unavailable:
    return Unavailable("the engine has stopped", code="engine_unavailable")


def _deliberate(error: Exception) -> TunesmithError:
    if isinstance(error, TunesmithError):
        return error
    log.error("request_failed", exc_info=error)
    return TunesmithError(
        "the engine failed on this request", code="internal_error", hint="See the engine's log."
    )

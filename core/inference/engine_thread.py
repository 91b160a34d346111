"""The engine thread: it alone touches the model, the bank and the requests.

One beat after the other it takes what came in, lets the scheduler say what goes on, computes, and
hands out what came of it: in one pass all answers of a base model advance by one token, whatever
their adapters, and prompts are read a piece further. Knows no torch and no
asyncio: the runner computes, and each piece of work says where its events go.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import TunesmithError, Unavailable, from_wire, to_wire
from core.inference.adapter_bank import AdapterBank, AdapterKey
from core.inference.base_shelf import BaseShelf
from core.inference.budgets import Budgets
from core.inference.chunks import Chosen, Chunk, choose, compute, next_pass, prompt_tokens
from core.inference.engine import EngineStatus, too_late
from core.inference.prefill_pace import PrefillPace
from core.inference.prefix_store import PrefixStore
from core.inference.preparation import Callbacks, Preparation, deliberate
from core.inference.row_memory import check_alone, fits
from core.inference.scheduler import Scheduler, engine_full
from core.inference.work import Work
from core.logging import get_logger

if TYPE_CHECKING:
    from core.inference.loaded_base import LoadedBase
    from core.inference.model_runner import ModelRunner
    from core.inference.prompts import EncodedPrompt

# Memory is given back to the system in one go, as it takes milliseconds.
_GIVE_BACK_SECONDS = 1.0
_WARN_SECONDS = 60.0
# From here on it is worth forgetting those of requests that have ended.
_MOST_DEADLINES = 1024

T = TypeVar("T")

log = get_logger(__name__)


class EngineThread:
    """Runs all work of one device; other threads reach its methods through `call`.

    Args:
        make_runner: Called in the thread; imports the model libraries.
        locate_adapter: Digest → directory of its files; may download, so other threads call it.
        send: Hands on the outcomes that were delivered; called after every pass.
        max_adapters: Adapters in memory.
        max_waiting: Requests that may wait; further ones are refused.
        max_rows: Answers that may be computed at a time.
        budgets: Memory for what.
        on_crash: Called when the thread ends by an error of its own.
    """

    def __init__(
        self,
        make_runner: Callable[[], ModelRunner],
        locate_adapter: Callable[[str], Path],
        send: Callable[[], None],
        *,
        max_adapters: int,
        max_waiting: int,
        max_rows: int,
        budgets: Budgets,
        on_crash: Callable[[], None],
    ) -> None:
        self._make_runner = make_runner
        self._locate_adapter = locate_adapter
        self._send = send
        self._max_adapters = max_adapters
        self._budgets = budgets
        self._on_crash = on_crash
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any] | None]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._scheduler = Scheduler(max_waiting=max_waiting, max_rows=max_rows)
        self._pace = PrefillPace()
        self._deadlines: list[tuple[float, int, weakref.ref[Work]]] = []
        self._numbers = itertools.count()
        self._advancing = False
        self._give_back_at: float | None = None
        self._base_has_left = False
        self._warned_at = float("-inf")
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._runner: ModelRunner
        self._limits: Budgets
        self._bank: AdapterBank
        self._shelf: BaseShelf
        self._prefixes: PrefixStore
        self._preparation: Preparation | None = None
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
        displaced = self._scheduler.enqueue(work)
        if displaced is not None:
            displaced.ended = True
            displaced.fail(engine_full(self._scheduler.waiting))
        if work.deadline is not None:
            entry = (work.deadline, next(self._numbers), weakref.ref(work))
            heapq.heappush(self._deadlines, entry)
            if len(self._deadlines) > _MOST_DEADLINES:
                self._deadlines = [entry for entry in self._deadlines if entry[2]() is not None]
                heapq.heapify(self._deadlines)
        self._advance()

    def cancel(self, work: Work) -> None:
        """Stop computing for a request; one that is being prepared ends with that stage."""
        work.cancelled = True
        if work in self._scheduler.running:
            self._end(work)
        elif work not in self._scheduler.admitted:
            work.ended = True
            self._scheduler.remove(work)
        elif work in self._scheduler.ready:
            self._end(work)

    def unload(self, digest: str) -> int:
        """Evict an adapter; see `AdapterBank.unload`."""
        return self._bank.unload(digest)

    def release(self, digest: str) -> bool:
        """Keep an adapter no longer; see `AdapterBank.release`."""
        return self._bank.release(digest)

    def status(self) -> EngineStatus:
        """Return residency and counters."""
        warning = self._bank.warning()
        bases = self._runner.bases
        return EngineStatus(
            ready=True,
            device=str(self._runner.device),
            base_models=list(bases),
            precision={digest: base.precision for digest, base in bases.items()},
            adapters=self._bank.residents(),
            evicted=self._bank.evicted(),
            warnings=[warning] if warning else [],
            running=len(self._scheduler.admitted),
            waiting=self._scheduler.waiting,
            loads=self._bank.loads,
            evictions=self._bank.evictions,
            load_failures=self._bank.load_failures,
            base_loads=self._shelf.loads,
            base_evictions=self._shelf.evictions,
            prompt_tokens=self._prompt_tokens,
            reused_prompt_tokens=self._prefixes.reused_tokens,
            completion_tokens=self._completion_tokens,
            resident_bytes=self._bank.bytes,
            resident_limit_bytes=self._limits.adapters,
            base_bytes=self._shelf.bytes,
            base_limit_bytes=self._limits.bases,
            row_bytes=sum(base.rows.cache_bytes for base in bases.values()),
            row_limit_bytes=self._limits.rows,
            prefix_bytes=self._prefixes.bytes,
            prefix_limit_bytes=self._limits.prefixes,
        )

    def _run(self) -> None:
        crashed = False
        try:
            self._prepare()
            self.ready.set()
            while not self._stopping:
                self._beat()
        except BaseException:
            log.exception("engine_crashed")
            crashed = True
        finally:
            self.ready.clear()
            self.ended.set()
            if self._preparation is not None:
                self._preparation.shut_down()
            self._fail_everything()
            if crashed:
                self._on_crash()

    def _prepare(self) -> None:
        self._runner = self._make_runner()
        self._limits = self._budgets.within(self._runner.memory_bytes)
        self._bank = AdapterBank(
            self._max_adapters, self._drop_adapter, max_bytes=self._limits.adapters
        )
        self._shelf = BaseShelf(self._limits.bases, self._drop_base)
        self._prefixes = PrefixStore(self._limits.prefixes)
        self._preparation = Preparation(
            self._runner,
            self._locate_adapter,
            self._bank,
            self._shelf,
            Callbacks(
                post=lambda function: self._inbox.put((function, None)),
                prepared=self._prepared,
                end=self._end,
            ),
        )

    def _fail_everything(self) -> None:
        for work in self._scheduler.everything():
            work.fail(_stopped())
        self._send()
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        while True:
            try:
                _, future = self._inbox.get_nowait()
            except queue.Empty:
                return
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(_stopped())

    def _beat(self) -> None:
        """Take what came in, and give every answer a token and some prompts a piece."""
        self._take_commands()
        for chunks in self._schedule():
            self._postprocess(chunks, self._compute(chunks))
            self._send()
        self._send()

    def _take_commands(self) -> None:
        if self._scheduler.idle:
            try:
                _run_command(*self._inbox.get(timeout=self._seconds_to_sleep()))
            except queue.Empty:
                return
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            _run_command(*command)
        self._send()

    def _seconds_to_sleep(self) -> float | None:
        times = [self._deadlines[0][0]] if self._deadlines else []
        times += [self._give_back_at] if self._give_back_at is not None else []
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _schedule(self) -> list[list[Chunk]]:
        """Let requests go on, and return what each pass that is due computes."""
        if self._deadlines or self._give_back_at is not None:
            self._note_time(time.monotonic())
        return next_pass(self._scheduler, self._pace, self._prefixes, self._end)

    def _note_time(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            work = heapq.heappop(self._deadlines)[2]()
            if work is not None and not (work.ended or work.cancelled):
                work.fail(too_late())
                self.cancel(work)
        if self._give_back_at is not None and self._give_back_at <= now:
            self._give_back_at = None
            assert self._preparation is not None
            self._preparation.give_memory_back(of_base=self._base_has_left)
            self._base_has_left = False

    def _advance(self) -> None:
        """Have the scheduler admit and start what there is room for."""
        if self._advancing:
            return
        assert self._preparation is not None
        self._advancing = True
        try:
            while (work := self._scheduler.start(self._fits)) is not None:
                pass
            while (work := self._scheduler.admit(self._reserve)) is not None:
                work.note_admitted()
                if work.refusal is not None:
                    self._end(work, work.refusal)
                else:
                    self._preparation.begin(work)
        finally:
            self._advancing = False

    def _reserve(self, work: Work) -> bool:
        assert self._preparation is not None
        try:
            return self._preparation.reserve(work)
        except TunesmithError as error:
            work.refusal = error
            return True

    def _fits(self, work: Work) -> bool:
        return fits([*self._scheduler.running, work], self._limits.rows)

    def _prepared(self, work: Work, base: LoadedBase, prompt: EncodedPrompt) -> None:
        check_alone(work, base, prompt, self._limits.rows)
        work.start(base, prompt)
        self._prompt_tokens += len(prompt.ids)
        self._scheduler.prepared(work)
        self._advance()

    def _compute(self, chunks: Sequence[Chunk]) -> list[Chosen]:
        """Compute one pass; return each answer's next token, or why there is none."""
        started = time.monotonic()
        try:
            logits = compute(chunks)
        except Exception as error:
            if len(chunks) == 1:
                return [(chunks[0].work, None, deliberate(error))]
            # One of them is to blame, perhaps for too much memory; the others shall not pay for it.
            log.warning("pass_failed", rows=len(chunks), error=repr(error))
            return [choice for chunk in chunks for choice in self._compute([chunk])]
        chosen = choose(chunks, logits, self._prefixes)
        answers = sum(chunk.line is not None for chunk in chunks)
        seconds = time.monotonic() - started
        self._pace.note_pass(seconds, answers=answers, prompt_tokens=prompt_tokens(chunks))
        return chosen

    def _postprocess(self, chunks: Sequence[Chunk], chosen: Sequence[Chosen]) -> None:
        """Hand out the tokens of a pass, and end what is complete or has failed."""
        failed: dict[Work, TunesmithError] = {}
        for work, line, choice in chosen:
            if isinstance(choice, TunesmithError):
                failed[work] = choice
                if work.key is not None and work.base.refusal(work.key.digest) is choice:
                    self._bank.refuse(work.key, choice)
            else:
                self._completion_tokens += 1
                if line is not None and work not in failed:
                    work.push(line, choice)
        for work, line in {chunk.work: chunk.line for chunk in chunks}.items():
            if work in failed or (work.prefilled and work.finished):
                self._end(work, failed.get(work))
            elif line is None and work.prefilled:
                self._scheduler.start_decoding(work)

    def _end(self, work: Work, error: TunesmithError | None = None) -> None:
        assert self._preparation is not None
        work.ended = True
        self._scheduler.remove(work)
        work.close()
        self._preparation.release(work)
        if error is not None and not work.cancelled:
            work.fail(error)
        self._advance()

    def _drop_adapter(self, key: AdapterKey) -> None:
        self._runner.remove_adapter(key)
        now = time.monotonic()
        self._give_back_at = self._give_back_at or now + _GIVE_BACK_SECONDS
        if now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            warning = self._bank.warning()
            if warning is not None:
                log.warning("adapter_bank_is_small", message=warning)

    def _drop_base(self, digest: str) -> None:
        self._bank.drop_base(digest)
        self._prefixes.drop_base(digest)
        del self._runner.bases[digest]
        self._base_has_left = True
        self._give_back_at = self._give_back_at or time.monotonic() + _GIVE_BACK_SECONDS
        log.info("base_model_unloaded", base_digest=digest)


def _run_command(function: Callable[[], Any], future: Future[Any] | None) -> None:
    if future is None:
        function()
    elif future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(deliberate(error))


def _stopped() -> Unavailable:
    return Unavailable("the engine has stopped", code="engine_unavailable")

"""What a request needs before its rows can be computed: base model, adapter, prompt.

Owns the pools in which files are read and prompts are tokenised while others are computed, and who
waits for what. Several requests for one cold adapter or base model cause one load. All methods are
called in the engine thread, and so is what the pools hand back. Knows no torch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.errors import Conflict, TunesmithError, Unavailable
from core.inference.adapter_bank import AdapterBank, AdapterKey
from core.inference.base_shelf import BaseShelf
from core.inference.work import Work
from core.logging import get_logger
from core.memory_limits import is_out_of_memory

if TYPE_CHECKING:
    from core.inference.loaded_base import LoadedBase, PreparedAdapter
    from core.inference.model_runner import ModelRunner
    from core.inference.prompts import EncodedPrompt

_POOL_THREADS = 4

log = get_logger(__name__)


@dataclass(frozen=True)
class Callbacks:
    """How preparation speaks to the engine thread.

    Attributes:
        post: Has a function called in the engine thread; safe from any thread.
        prepared: Takes a request with its base model and prompt.
        end: Ends a request that needs no rows, has left, or failed.
    """

    post: Callable[[Callable[[], None]], None]
    prepared: Callable[[Work, LoadedBase, EncodedPrompt], None]
    end: Callable[[Work, TunesmithError | None], None]


class _ReadAdapter(NamedTuple):
    key: AdapterKey
    started: float
    adapter: PreparedAdapter


class Preparation:
    """Brings into memory what requests need; see the module.

    Args:
        runner: Loads.
        locate_adapter: Digest → directory of its files; may download.
        bank: Which adapters are in memory.
        shelf: Which base models are.
        callbacks: How to go on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        locate_adapter: Callable[[str], Path],
        bank: AdapterBank,
        shelf: BaseShelf,
        callbacks: Callbacks,
    ) -> None:
        self._runner = runner
        self._locate_adapter = locate_adapter
        self._bank = bank
        self._shelf = shelf
        self._on = callbacks
        self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="engine-files")
        # Of their own: however long downloads take, prompts are encoded meanwhile.
        self._adapter_pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="engine-adapters")
        self._waiting_for_base: dict[str, list[Work]] = {}
        self._waiting_for_adapter: dict[AdapterKey, list[Work]] = {}
        self._waiting_for_room: deque[_ReadAdapter] = deque()

    def shut_down(self) -> None:
        """End the pools; what they have not begun is dropped."""
        for pool in (self._pool, self._adapter_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def reserve(self, work: Work) -> bool:
        """Pin a request's base model and adapter.

        Returns:
            False when there is no room for them now; nothing has changed then.

        Raises:
            Conflict: Code `base_model_too_large` or `base_model_not_loaded`.
        """
        if work.key is not None and self._waiting_for_room:
            # Room for an adapter that was read comes only when others are not used any more.
            return False
        base = work.base_model
        # What is only kept in stock takes no base model from those that are asked for.
        if not self._shelf.pin(base.digest, lambda: self._runner.size(base), evict=not work.keep):
            if work.keep:
                raise Conflict(
                    f"the base model {base.name} is not in memory, and others take its room",
                    code="base_model_not_loaded",
                    hint="Raise TUNESMITH_ENGINE_BASE_BYTES.",
                )
            return False
        if work.key is not None and not self._bank.pin(work.key):
            self._shelf.unpin(base.digest)
            return False
        work.base_pinned, work.adapter_pinned = True, work.key is not None
        return True

    def release(self, work: Work) -> None:
        """Give back what `reserve` took."""
        if work.adapter_pinned and work.key is not None:
            self._bank.unpin(work.key)
        if work.base_pinned:
            self._shelf.unpin(work.base_model.digest)
        work.adapter_pinned = work.base_pinned = False
        self._place_adapters()

    def begin(self, work: Work) -> None:
        """Go through the stages of a request for which `reserve` returned True."""
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

    def give_memory_back(self, *, of_base: bool) -> None:
        """Have what was freed returned to the system, beside the engine thread."""
        self._pool.submit(self._runner.give_memory_back, of_base=of_base)

    def _base_loaded(self, digest: str, future: Future[LoadedBase]) -> None:
        waiters = self._waiting_for_base.pop(digest)
        try:
            base = future.result()
        except Exception as error:
            self._shelf.failed(digest)
            for work in waiters:
                work.base_pinned = False
            for work in waiters:
                self._on.end(work, deliberate(error))
            return
        self._runner.bases[digest] = base
        self._shelf.loaded(digest, base.bytes)
        log.info("base_model_loaded", base_digest=digest, bytes=base.bytes)
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

    def _adapter_read(
        self, key: AdapterKey, started: float, future: Future[PreparedAdapter]
    ) -> None:
        try:
            self._waiting_for_room.append(_ReadAdapter(key, started, future.result()))
        except Exception as problem:
            self._adapter_failed(key, deliberate(problem))
            return
        self._place_adapters()

    def _place_adapters(self) -> None:
        """Make adapters that were read resident, in turn, as far as there is room."""
        while self._waiting_for_room:
            read = self._waiting_for_room[0]
            key, size = read.key, read.adapter.bytes
            try:
                if not self._bank.make_room(size):
                    return
                self._waiting_for_room.popleft()
                self._runner.bases[key.base_digest].insert(read.adapter)
            except Exception as problem:
                if self._waiting_for_room and self._waiting_for_room[0] is read:
                    self._waiting_for_room.popleft()
                self._adapter_failed(key, deliberate(problem))
                continue
            load_ms = (time.monotonic() - read.started) * 1000
            self._bank.loaded(key, bytes=size, load_ms=load_ms)
            log.info("adapter_loaded", digest=key.digest, load_ms=round(load_ms, 1), bytes=size)
            for work in self._waiting_for_adapter.pop(key):
                self._need_prompt(work)

    def _adapter_failed(self, key: AdapterKey, error: TunesmithError) -> None:
        self._bank.failed(key, error, remember=isinstance(error, Conflict))
        log.warning("adapter_refused", digest=key.digest, code=error.code)
        waiters = self._waiting_for_adapter.pop(key)
        # All of them first: as each one ends, another request may pin the same adapter anew.
        for work in waiters:
            work.adapter_pinned = False
        for work in waiters:
            self._on.end(work, error)

    def _need_prompt(self, work: Work) -> None:
        work.note_loaded()
        request = work.request
        if work.cancelled:
            self._on.end(work, None)
        elif request is None:
            self._on.end(work, self._finish_load(work))
        else:
            base = self._runner.bases[work.base_model.digest]
            encoder = base.encoder(work.adapter.digest if work.adapter else None)
            self._in_pool(
                self._pool,
                lambda: encoder.encode(request),
                lambda future: self._prompt_encoded(work, base, future),
            )

    def _finish_load(self, work: Work) -> TunesmithError | None:
        assert work.key is not None
        base = self._runner.bases[work.key.base_digest]
        try:
            base.prove(work.key.digest)
            if work.keep:
                self._bank.keep(work.key)
        except Exception as problem:
            error = deliberate(problem)
            if base.refusal(work.key.digest) is not None:
                self._bank.refuse(work.key, error)
            return error
        work.deliver(self._bank.describe(work.key))
        return None

    def _prompt_encoded(self, work: Work, base: LoadedBase, future: Future[EncodedPrompt]) -> None:
        if work.cancelled:
            self._on.end(work, None)
            return
        try:
            self._on.prepared(work, base, future.result())
        except Exception as error:
            self._on.end(work, deliberate(error))

    def _in_pool(
        self,
        pool: ThreadPoolExecutor,
        task: Callable[[], Any],
        then: Callable[[Future[Any]], None],
    ) -> None:
        future = pool.submit(task)
        future.add_done_callback(lambda done: self._on.post(lambda: then(done)))


def deliberate(error: Exception) -> TunesmithError:
    """Return an error that may be told; one that nobody foresaw is logged and kept back."""
    if isinstance(error, TunesmithError):
        return error
    log.error("request_failed", exc_info=error)
    if is_out_of_memory(error):
        return Unavailable(
            "the engine has not enough memory for this request at present",
            code="out_of_memory",
            retry_after_seconds=2,
            hint="Ask for fewer or shorter answers, or lower TUNESMITH_ENGINE_KV_BYTES, so that "
            "such requests wait or are refused.",
        )
    return TunesmithError(
        "the engine failed on this request", code="internal_error", hint="See the engine's log."
    )

"""Which adapters this process has loaded at a vLLM server, and through which gates they went there.

Owns their names at the server, which are made of their digests, and who waits for which load. Used
in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.errors import Conflict, TunesmithError, Unavailable
from core.inference.adapter_bank import AdapterBank, AdapterKey
from core.inference.engine import AdapterRef, BaseModelRef
from core.logging import get_logger
from service.vllm_engine_base import BASE_MODEL_NOT_SERVED, ServedBases
from service.vllm_engine_fields import effect_body
from service.vllm_engine_front import FrontProcess
from service.vllm_engine_http import ModelMissing, VllmServer
from service.vllm_engine_plain import PlainModels

# Of an adapter's golden tokens, as many as our own engine looks at.
_MAX_GOLDEN_TOKENS = 16
# Refusals that say something of the server, not of the adapter.
_NOT_THE_ADAPTERS = frozenset({BASE_MODEL_NOT_SERVED, "adapters_not_loadable"})

log = get_logger(__name__)


class Hold:
    """What one request holds of an adapter; `pinned` ends when its load fails."""

    def __init__(self, key: AdapterKey) -> None:
        self.key = key
        self.pinned = True


class VllmAdapters:
    """The adapters of one server.

    Args:
        server: The server.
        bases: Tells which of its models is which.
        plain: Tells what computes without an adapter.
        front: Checks adapters.
        locate_adapter: Digest → directory of its files, under the path that the server sees, too.
        max_adapters: Adapters that are loaded at a time.
        max_bytes: What their files may take together.
    """

    def __init__(
        self,
        server: VllmServer,
        bases: ServedBases,
        plain: PlainModels,
        front: FrontProcess,
        locate_adapter: Callable[[str], Path],
        max_adapters: int,
        max_bytes: int,
    ) -> None:
        self._server = server
        self._bases = bases
        self._plain = plain
        self._front = front
        self._locate_adapter = locate_adapter
        self.bank = AdapterBank(max_adapters, self._on_evict, max_bytes=max_bytes)
        self.reloads = 0
        self._holds: defaultdict[AdapterKey, set[Hold]] = defaultdict(set)
        self._loading: dict[AdapterKey, asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self._names: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._forgetting: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Begin nothing more; what is loaded at the server stays there."""
        for task in [*self._forgetting, *self._loading.values()]:
            task.cancel()

    async def unload(self, digest: str) -> int:
        """Forget an adapter as soon as nobody holds it; return its size."""
        size = self.bank.unload(digest)
        await asyncio.gather(*self._forgetting, return_exceptions=True)
        return size

    async def directory(self, digest: str) -> str:
        """Return where an adapter's files are.

        It is asked for with each request: the server reads the files anew when it had dropped them.

        Raises:
            NotFound: They are gone.
            Unavailable: The artifact store cannot be reached.
        """
        return str(await asyncio.to_thread(self._locate_adapter, digest))

    async def hold(self, base_model: BaseModelRef, adapter: AdapterRef) -> Hold:
        """Pin an adapter, loading it where needed, until `let_go`.

        Raises:
            NotFound: Its files are gone.
            Conflict: A gate or the server refuses it.
            Unavailable: The server or the artifact store cannot be reached.
        """
        key = AdapterKey(base_model.digest, adapter.digest)
        failure = self.bank.recent_failure(key)
        if failure is not None:
            raise failure
        while not self.bank.pin(key):
            await self._wait_for_room()
        hold = self._note_hold(key)
        try:
            if not self.bank.is_resident(key):
                await self._once(key, lambda: self._load(base_model, key, self._pin_again(key)))
        except BaseException:
            self.let_go(hold)
            raise
        return hold

    def let_go(self, hold: Hold) -> None:
        """Give back what `hold` gave."""
        self._holds[hold.key].discard(hold)
        if not self._holds[hold.key]:
            del self._holds[hold.key]
        if hold.pinned:
            hold.pinned = False
            self.bank.unpin(hold.key)
        self._room.set()

    async def ensure_listed(
        self, base_model: BaseModelRef, key: AdapterKey, listed: Collection[str]
    ) -> None:
        """Load an adapter again that the server has forgotten since.

        Args:
            base_model: The base model that it belongs to.
            key: A pinned adapter.
            listed: Names that the server knew after that.
        """
        if name_of(key.digest) not in listed:
            await self._once(key, lambda: self._reload(base_model, key))

    def _pin_again(self, key: AdapterKey) -> Hold:
        """Pin for the load itself: those who wait for it may leave."""
        self.bank.pin(key)
        return self._note_hold(key)

    def _note_hold(self, key: AdapterKey) -> Hold:
        hold = Hold(key)
        self._holds[key].add(hold)
        return hold

    async def _make_room(self, size: int) -> None:
        while not self.bank.make_room(size):
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    async def _once(self, key: AdapterKey, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do work on an adapter, or wait for who does it; leaving does not end it for others."""
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._worked(key, done))
        await asyncio.shield(task)

    def _worked(self, key: AdapterKey, task: asyncio.Task[None]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; perhaps nobody does any more

    async def _load(self, base_model: BaseModelRef, key: AdapterKey, own: Hold) -> None:
        started = time.monotonic()
        try:
            size = await self._put(base_model, key)
            # Another one may have taken the room meanwhile; from here on nobody can.
            await self._make_room(size)
            load_ms = (time.monotonic() - started) * 1000
            self.bank.loaded(key, bytes=size, load_ms=load_ms)
            log.info("adapter_loaded", digest=key.digest, load_ms=round(load_ms, 1), bytes=size)
        except BaseException as error:
            for hold in self._holds[key]:
                hold.pinned = False
            told = error if isinstance(error, TunesmithError) else _internal_error()
            remember = isinstance(error, Conflict) and error.code not in _NOT_THE_ADAPTERS
            self.bank.failed(key, told, remember=remember)
            log.warning("adapter_refused", digest=key.digest, code=told.code)
            raise
        finally:
            self.let_go(own)

    async def _reload(self, base_model: BaseModelRef, key: AdapterKey) -> None:
        await self._put(base_model, key)
        self.reloads += 1
        log.info("adapter_reloaded", digest=key.digest)

    async def _put(self, base_model: BaseModelRef, key: AdapterKey) -> int:
        """Take an adapter through the gates to the server; return its size."""
        directory = await self.directory(key.digest)
        admitted = await self._front.ask(
            "admit", base=base_model.model_dump(), digest=key.digest, directory=directory
        )
        if not self.bank.is_resident(key):
            await self._make_room(admitted["bytes"])
        cards = await self._server.models()
        card = await self._bases.find(cards, base_model)
        name = name_of(key.digest)
        async with self._names[name]:
            if any(other.id == name and other.root != directory for other in cards):
                # From another place, which may be gone when the server reads it again.
                await self._server.unload_adapter(name)
            await self._server.load_adapter(name, directory)
            try:
                golden = admitted["golden_token_ids"][:_MAX_GOLDEN_TOKENS]
                names = {other.id for other in cards}
                plain = await self._plain.ensure(base_model, card.id, names)
                await self._check_effect(plain, name, golden)
            except BaseException:
                with suppress(TunesmithError):
                    await asyncio.shield(self._server.unload_adapter(name))
                raise
        return int(admitted["bytes"])

    async def _check_effect(self, base: str, adapter: str, ids: list[int]) -> None:
        try:
            answers = [await self._server.ask(effect_body(name, ids)) for name in (base, adapter)]
        except ModelMissing as error:
            raise Unavailable(
                "the vLLM server was restarted meanwhile", code="engine_unavailable"
            ) from error
        if _values(answers[0]) == _values(answers[1]):
            raise Conflict(
                "the adapter changes nothing: the server computes its golden tokens as without it",
                code="adapter_has_no_effect",
                hint="Train for more steps or with a higher learning rate.",
            )

    def _on_evict(self, key: AdapterKey) -> None:
        task = asyncio.get_running_loop().create_task(self._forget(key))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)
        self._room.set()

    async def _forget(self, key: AdapterKey) -> None:
        name = name_of(key.digest)
        async with self._names[name]:
            if key in self._loading or self.bank.is_resident(key):
                return  # wanted again meanwhile
            try:
                await self._server.unload_adapter(name)
            except TunesmithError as error:
                # It stays in the server's list, and in its memory as long as there is room.
                log.warning("adapter_not_unloaded", digest=key.digest, code=error.code)
        if not self._names[name].locked():
            del self._names[name]


def name_of(digest: str) -> str:
    """Return what an adapter is called at the server."""
    return f"tunesmith-{digest}"


def _values(answer: dict[str, Any]) -> Any:
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    return [choice["logprobs"]["top_logprobs"] for choice in choices]


def _internal_error() -> TunesmithError:
    return TunesmithError("the engine failed on this request", code="internal_error")

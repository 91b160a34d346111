"""Which adapters stay in memory: the policy alone, without a tensor.

Owns slots, bytes, pins, the order of eviction and the memory of failed loads. Knows no torch:
whoever holds the weights is told through `on_evict`. Used from one thread only.

An adapter is pinned while requests use it. An operator may have adapters kept, which stay when
nobody uses them; kept ones get half of the bank at most, so that there is always room for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from core.errors import Conflict, TunesmithError
from core.inference.engine import ResidentAdapter

# What was used within this time counts as live.
_LIVE_SECONDS = 600.0
_MOST_REMEMBERED = 256
# Loads that took no measurable time are not free.
_LEAST_LOAD_MS = 1.0


class AdapterKey(NamedTuple):
    """An adapter on a base model; the pair is the key, so that a wrong pair never hits."""

    base_digest: str
    digest: str


@dataclass
class _Entry:
    pins: int = 0
    resident: bool = False
    leaving: bool = False
    bytes: int = 0
    hits: int = 0
    load_ms: float = 0.0
    last_used: float = 0.0
    evictions: int = 0


class AdapterBank:
    """Room for a number and a size of adapters; those in use stay.

    Of the others the one leaves whose time since its last use is longest in proportion to what
    loading it took.

    Args:
        capacity: Number of slots.
        on_evict: Called with the key of a resident adapter that leaves.
        max_bytes: Size of all adapters together.
        failure_memory_seconds: How long a failed load is not tried again.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        capacity: int,
        on_evict: Callable[[AdapterKey], None],
        *,
        max_bytes: int = 2**63,
        failure_memory_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._on_evict = on_evict
        self._failure_memory_seconds = failure_memory_seconds
        self._clock = clock
        self._entries: dict[AdapterKey, _Entry] = {}
        self._gone: dict[AdapterKey, _Entry] = {}
        self._failures: dict[AdapterKey, tuple[float, TunesmithError]] = {}
        self._kept: set[AdapterKey] = set()
        self.max_bytes = max_bytes
        self.bytes = 0
        self.loads = 0
        self.evictions = 0
        self.load_failures = 0

    def recent_failure(self, key: AdapterKey) -> TunesmithError | None:
        """Return why a load of this adapter failed a short while ago, or `None`."""
        now = self._clock()
        self._failures = {
            failed: (expires, error)
            for failed, (expires, error) in self._failures.items()
            if expires > now
        }
        _, error = self._failures.get(key, (0.0, None))
        return error

    def pin(self, key: AdapterKey) -> bool:
        """Take a slot for one request, evicting an unused adapter where needed.

        Returns:
            False when every slot is in use; nothing has changed then.
        """
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._capacity and not self._evict_one():
                return False
            entry = self._entries[key] = self._gone.pop(key, _Entry())
        elif entry.resident:
            entry.hits += 1
        entry.pins += 1
        entry.last_used = self._clock()
        return True

    def unpin(self, key: AdapterKey) -> None:
        """Give back what `pin` took; a no-op for an adapter whose load has failed."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.pins -= 1
        entry.last_used = self._clock()
        if entry.pins == 0 and not entry.resident:
            del self._entries[key]
        elif entry.pins == 0 and entry.leaving:
            self._evict(key)

    def is_resident(self, key: AdapterKey) -> bool:
        """Tell whether the adapter is in memory."""
        entry = self._entries.get(key)
        return entry is not None and entry.resident

    def make_room(self, size: int) -> bool:
        """Evict what is not in use until an adapter that was read fits in.

        Kept ones leave only if it would never fit beside them.

        Returns:
            False when what is in use leaves no room; try again when something has been unpinned.

        Raises:
            Conflict: Code `adapter_too_large`; it would not fit into an empty bank.
        """
        if size > self.max_bytes:
            raise Conflict(
                f"the adapter takes {size:,} bytes in memory, and the engine keeps "
                f"{self.max_bytes:,} bytes of adapters at most",
                code="adapter_too_large",
                hint="Train with a lower rank, or raise TUNESMITH_ENGINE_ADAPTER_BYTES.",
            )
        kept = sum(entry.bytes for key, entry in self._entries.items() if self._stays(key))
        while self.bytes + size > self.max_bytes:
            if not self._evict_one(also_kept=kept + size > self.max_bytes):
                return False
        return True

    def loaded(self, key: AdapterKey, *, bytes: int, load_ms: float) -> None:  # noqa: A002
        """Note that a pinned adapter is in memory now."""
        entry = self._entries[key]
        entry.resident, entry.bytes, entry.load_ms = True, bytes, load_ms
        self.bytes += bytes
        self.loads += 1

    def failed(self, key: AdapterKey, error: TunesmithError, *, remember: bool) -> None:
        """Free the slot of an adapter that could not be loaded, whoever waits for it.

        Args:
            key: The adapter.
            error: What `recent_failure` shall return.
            remember: Whether the same files would fail again.
        """
        del self._entries[key]
        self.load_failures += 1
        if remember:
            self._remember(key, error)

    def refuse(self, key: AdapterKey, error: TunesmithError) -> None:
        """Let a resident adapter leave with its last request, and remember it as a failed load.

        Args:
            key: The adapter; a no-op for one that is about to leave.
            error: What `recent_failure` shall return.
        """
        entry = self._entries[key]
        if entry.leaving:
            return
        self.unload(key.digest)
        self.load_failures += 1
        self._remember(key, error)

    def unload(self, digest: str) -> int:
        """Evict an adapter from every base model, at once or when its last request ends.

        It is not kept any longer either.

        Returns:
            How many bytes it takes; 0 when it was not in memory.
        """
        found = [
            key for key, entry in self._entries.items() if key.digest == digest and entry.resident
        ]
        size = sum(self._entries[key].bytes for key in found)
        self.release(digest)
        for key in found:
            if self._entries[key].pins:
                self._entries[key].leaving = True
            else:
                self._evict(key)
        for key in [key for key in self._failures if key.digest == digest]:
            del self._failures[key]
        return size

    def drop_base(self, base_digest: str) -> None:
        """Evict all adapters of a base model that nobody uses."""
        for key in [key for key in self._entries if key.base_digest == base_digest]:
            if self.is_resident(key):
                self._evict(key)

    def keep(self, key: AdapterKey) -> None:
        """Let a resident adapter stay when nobody uses it.

        Raises:
            Conflict: Code `kept_adapters_full`; with it, kept ones would take more than half.
        """
        kept = [other for other in self._kept | {key} if self.is_resident(other)]
        size = sum(self._entries[other].bytes for other in kept)
        if len(kept) > self._capacity // 2 or size > self.max_bytes // 2:
            raise Conflict(
                f"kept adapters may take half of the engine's bank: {self._capacity // 2} "
                f"adapters and {self.max_bytes // 2:,} bytes",
                code="kept_adapters_full",
                hint="Release another one, or raise TUNESMITH_ENGINE_ADAPTER_BYTES.",
            )
        self._kept.add(key)

    def release(self, digest: str) -> bool:
        """Let an adapter leave when nobody uses it; return whether it had been kept."""
        released = {key for key in self._kept if key.digest == digest}
        self._kept -= released
        return bool(released)

    def describe(self, key: AdapterKey) -> ResidentAdapter:
        """Return what is known of a resident adapter."""
        return self._describe(key, self._entries[key])

    def residents(self) -> list[ResidentAdapter]:
        """Return all resident adapters, the most recently used first."""
        found = [self.describe(key) for key, entry in self._entries.items() if entry.resident]
        return sorted(found, key=lambda adapter: adapter.last_used_seconds_ago)

    def evicted(self) -> list[ResidentAdapter]:
        """Return adapters that left not long ago, the most recently used first."""
        found = [self._describe(key, entry) for key, entry in self._gone.items()]
        return sorted(found, key=lambda adapter: adapter.last_used_seconds_ago)

    def warning(self) -> str | None:
        """Return what is wrong when more adapters are in use than the bank holds."""
        since = self._clock() - _LIVE_SECONDS
        entries = [*self._entries.values(), *self._gone.values()]
        live = [entry for entry in entries if entry.last_used >= since and entry.bytes]
        size = sum(entry.bytes for entry in live)
        if len(live) <= self._capacity and size <= self.max_bytes:
            return None
        return (
            f"{len(live)} adapters of {size:,} bytes were used in the last "
            f"{_LIVE_SECONDS / 60:.0f} minutes; the bank holds {self._capacity} adapters and "
            f"{self.max_bytes:,} bytes, so they are loaded again and again. Raise "
            "TUNESMITH_ENGINE_MAX_ADAPTERS or TUNESMITH_ENGINE_ADAPTER_BYTES."
        )

    def _describe(self, key: AdapterKey, entry: _Entry) -> ResidentAdapter:
        return ResidentAdapter(
            digest=key.digest,
            base_digest=key.base_digest,
            tier="memory" if entry.resident else "disk",
            kept=key in self._kept,
            requests=entry.pins,
            bytes=entry.bytes,
            hits=entry.hits,
            load_ms=entry.load_ms,
            last_used_seconds_ago=max(0.0, self._clock() - entry.last_used),
            evictions=entry.evictions,
        )

    def _remember(self, key: AdapterKey, error: TunesmithError) -> None:
        self._failures[key] = (self._clock() + self._failure_memory_seconds, error)

    def _stays(self, key: AdapterKey) -> bool:
        return key in self._kept and self.is_resident(key)

    def _evict_one(self, *, also_kept: bool = False) -> bool:
        unused = [key for key, entry in self._entries.items() if entry.pins == 0]
        chosen = [key for key in unused if not self._stays(key)] or (unused if also_kept else [])
        if not chosen:
            return False
        self._evict(max(chosen, key=self._dispensability))
        return True

    def _dispensability(self, key: AdapterKey) -> float:
        entry = self._entries[key]
        return (self._clock() - entry.last_used) / max(entry.load_ms, _LEAST_LOAD_MS)

    def _evict(self, key: AdapterKey) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.bytes
        self.evictions += 1
        entry.resident = entry.leaving = False
        entry.evictions += 1
        self._gone[key] = entry
        if len(self._gone) > _MOST_REMEMBERED:
            del self._gone[next(iter(self._gone))]
        self._on_evict(key)

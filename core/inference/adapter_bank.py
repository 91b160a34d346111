"""Which adapters stay in memory: the policy alone, without a tensor.

Owns slots, pins, the order of eviction and the memory of failed loads. Knows no torch: whoever
holds the weights is told through `on_evict`. Used from one thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from core.errors import TunesmithError
from core.inference.engine import ResidentAdapter


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


class AdapterBank:
    """Slots for a number of adapters; those in use stay, of the others the longest unused leaves.

    Args:
        capacity: Number of slots.
        on_evict: Called with the key of a resident adapter that leaves.
        failure_memory_seconds: How long a failed load is not tried again.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        capacity: int,
        on_evict: Callable[[AdapterKey], None],
        *,
        failure_memory_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._on_evict = on_evict
        self._failure_memory_seconds = failure_memory_seconds
        self._clock = clock
        self._entries: dict[AdapterKey, _Entry] = {}
        self._failures: dict[AdapterKey, tuple[float, TunesmithError]] = {}
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
            if len(self._entries) >= self._capacity and not self._make_room():
                return False
            entry = self._entries[key] = _Entry()
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

    def loaded(self, key: AdapterKey, *, bytes: int, load_ms: float) -> None:  # noqa: A002
        """Note that a pinned adapter is in memory now."""
        entry = self._entries[key]
        entry.resident, entry.bytes, entry.load_ms = True, bytes, load_ms
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
            self._failures[key] = (self._clock() + self._failure_memory_seconds, error)

    def unload(self, digest: str) -> bool:
        """Evict an adapter from every base model, at once or when its last request ends.

        Returns:
            Whether it was in memory.
        """
        found = [
            key for key, entry in self._entries.items() if key.digest == digest and entry.resident
        ]
        for key in found:
            if self._entries[key].pins:
                self._entries[key].leaving = True
            else:
                self._evict(key)
        for key in [key for key in self._failures if key.digest == digest]:
            del self._failures[key]
        return bool(found)

    def describe(self, key: AdapterKey) -> ResidentAdapter:
        """Return what is known of a resident adapter."""
        entry = self._entries[key]
        return ResidentAdapter(
            digest=key.digest,
            base_digest=key.base_digest,
            bytes=entry.bytes,
            hits=entry.hits,
            load_ms=entry.load_ms,
            last_used_seconds_ago=max(0.0, self._clock() - entry.last_used),
        )

    def residents(self) -> list[ResidentAdapter]:
        """Return all resident adapters, the most recently used first."""
        found = [self.describe(key) for key, entry in self._entries.items() if entry.resident]
        return sorted(found, key=lambda adapter: adapter.last_used_seconds_ago)

    def _make_room(self) -> bool:
        unused = [key for key, entry in self._entries.items() if entry.pins == 0]
        if not unused:
            return False
        self._evict(min(unused, key=lambda key: self._entries[key].last_used))
        return True

    def _evict(self, key: AdapterKey) -> None:
        del self._entries[key]
        self.evictions += 1
        self._on_evict(key)

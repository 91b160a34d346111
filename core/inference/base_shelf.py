"""Which base models stay in memory: the policy alone, without a tensor.

Those that requests use stay; of the others the longest unused leaves when another one needs its
memory. Knows no torch: whoever holds the weights is told through `on_evict`. Used from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import Conflict


@dataclass
class _Entry:
    bytes: int
    pins: int = 0
    resident: bool = False
    last_used: float = 0.0


class BaseShelf:
    """Memory for base models.

    Args:
        max_bytes: Size of all together.
        on_evict: Called with the digest of a resident model that leaves.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        on_evict: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_evict = on_evict
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self.max_bytes = max_bytes
        self.loads = 0
        self.evictions = 0

    @property
    def bytes(self) -> int:
        """What the models in memory, and those that are being loaded, take."""
        return sum(entry.bytes for entry in self._entries.values())

    def pin(self, digest: str, size: Callable[[], int], *, evict: bool = True) -> bool:
        """Take memory for a base model for one request.

        Args:
            digest: The base model.
            size: Returns what it will take, where that is not known yet.
            evict: Whether unused ones may have to leave for it.

        Returns:
            False when there is no room; nothing has changed then.

        Raises:
            Conflict: Code `base_model_too_large`; it would not fit alone.
        """
        entry = self._entries.get(digest)
        if entry is None:
            wanted = size()
            if wanted > self.max_bytes:
                raise Conflict(
                    f"the base model takes {wanted:,} bytes in memory, and the engine keeps "
                    f"{self.max_bytes:,} bytes of base models at most",
                    code="base_model_too_large",
                    hint="Raise TUNESMITH_ENGINE_BASE_BYTES, or use a smaller model.",
                )
            if self.bytes + wanted > self.max_bytes and not (evict and self._make_room(wanted)):
                return False
            entry = self._entries[digest] = _Entry(wanted)
        entry.pins += 1
        entry.last_used = self._clock()
        return True

    def unpin(self, digest: str) -> None:
        """Give back what `pin` took; a no-op for a model whose load has failed."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.pins -= 1
        entry.last_used = self._clock()

    def loaded(self, digest: str, size: int) -> None:
        """Note that a model is in memory now, and what it really takes."""
        entry = self._entries[digest]
        entry.resident, entry.bytes = True, size
        self.loads += 1

    def failed(self, digest: str) -> None:
        """Free the memory of a model that could not be loaded, whoever waits for it."""
        del self._entries[digest]

    def _make_room(self, wanted: int) -> bool:
        unused = sorted(
            (digest for digest, entry in self._entries.items() if not entry.pins),
            key=lambda digest: self._entries[digest].last_used,
        )
        free = self.max_bytes - self.bytes
        if free + sum(self._entries[digest].bytes for digest in unused) < wanted:
            return False
        for digest in unused:
            if free >= wanted:
                break
            free += self._entries.pop(digest).bytes
            self.evictions += 1
            self._on_evict(digest)
        return True

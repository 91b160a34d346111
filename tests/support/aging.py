"""A store whose objects are as old as a test wants, over a real store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.storage import ArtifactStore, Blob, PublishedAdapter, StoredObject

OLD_SECONDS = 10_000_000.0


class AgingStore:
    """Passes everything on to a real store; what was `age`d looks old until it is stored again.

    Args:
        inner: The real store.
    """

    def __init__(self, inner: ArtifactStore) -> None:
        self._inner = inner
        self._old: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def age(self, name: str) -> None:
        """Make a stored object old."""
        self._old.add(name)

    def age_all(self) -> None:
        """Make everything that is stored now old."""
        for listing in (self.list_blobs, self.list_adapters, self.list_temporary):
            self._old.update(entry.name for entry in listing())

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        blob = self._inner.write_blob(chunks, max_bytes)
        self._old.discard(blob.sha256)
        return blob

    def publish_adapter(self, source: Path) -> PublishedAdapter:
        published = self._inner.publish_adapter(source)
        self._old.discard(published.digest)
        return published

    def list_blobs(self) -> Iterator[StoredObject]:
        return self._aged(self._inner.list_blobs)

    def list_adapters(self) -> Iterator[StoredObject]:
        return self._aged(self._inner.list_adapters)

    def list_temporary(self) -> Iterator[StoredObject]:
        return self._aged(self._inner.list_temporary)

    def _aged(self, listing: Callable[[], Iterator[StoredObject]]) -> Iterator[StoredObject]:
        for entry in listing():
            yield replace(entry, age_seconds=OLD_SECONDS) if entry.name in self._old else entry

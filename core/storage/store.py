"""What every artifact store can do, and the values that it takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from core.artifacts import Manifest


@dataclass(frozen=True)
class Blob:
    """Stored bytes, named by their hash."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter directory in the store; `bytes` is the sum over its files."""

    digest: str
    bytes: int
    manifest: Manifest


@dataclass(frozen=True)
class StoredObject:
    """Something that lies in a store, as housekeeping sees it.

    Attributes:
        name: SHA-256 of a blob, digest of an adapter, or the store's own name of a leftover.
        bytes: What it takes up.
        age_seconds: Since it was last written, or stored again.
    """

    name: str
    bytes: int
    age_seconds: float


class ArtifactStore(Protocol):
    """Where artifacts live. Objects are immutable; storing an object again changes nothing.

    Every method may raise `Unavailable` with code `artifact_store_unavailable` when the store
    cannot be reached, or `storage_full` when a disk is full.
    """

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        """Store a stream of bytes.

        Raises:
            TooLarge: The stream is longer than `max_bytes`; nothing is kept.
        """
        ...

    def open_blob(self, sha256: str) -> BinaryIO:
        """Open stored bytes for reading.

        Raises:
            NotFound: There is no such blob.
        """
        ...

    def blob_path(self, sha256: str) -> Path:
        """Return a local path of stored bytes; must not be written to.

        Raises:
            NotFound: There is no such blob.
        """
        ...

    def has_blob(self, sha256: str) -> bool:
        """Tell whether bytes are stored."""
        ...

    def delete_blob(self, sha256: str) -> None:
        """Remove stored bytes; removing what is not there is no error."""
        ...

    def publish_adapter(self, source: Path) -> PublishedAdapter:
        """Store a complete artifact directory under its digest.

        Raises:
            InvalidInput: The files do not match the manifest.
        """
        ...

    def adapter_path(self, digest: str) -> Path:
        """Return a local directory of a published adapter; must not be written to.

        Raises:
            NotFound: There is no such adapter.
        """
        ...

    def open_adapter(self, digest: str) -> dict[str, BinaryIO]:
        """Open every file of a published adapter, the manifest included, by its name.

        Raises:
            NotFound: There is no such adapter.
        """
        ...

    def has_adapter(self, digest: str) -> bool:
        """Tell whether an adapter is published."""
        ...

    def delete_adapter(self, digest: str) -> None:
        """Remove a published adapter; removing what is not there is no error."""
        ...

    def list_blobs(self) -> Iterator[StoredObject]:
        """Yield all stored blobs."""
        ...

    def list_adapters(self) -> Iterator[StoredObject]:
        """Yield all published adapters."""
        ...

    def list_temporary(self) -> Iterator[StoredObject]:
        """Yield what is being written, or was when its writer died; age tells which."""
        ...

    def delete_temporary(self, name: str) -> None:
        """Remove a leftover that `list_temporary` named; one that is gone is no error."""
        ...

    def check_writable(self) -> None:
        """Try to store something small.

        Raises:
            Unavailable: It cannot be stored; the message says why.
        """
        ...

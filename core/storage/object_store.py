"""Artifacts in a bucket, with copies on the disk of each machine that reads them.

Blobs are objects `blobs/<sha256>`, written if there is none. Adapters are as `publications` says:
the first complete publisher writes the manifest; who comes later removes the files of their own
try. What readers are given as a path is a verified copy in the cache.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from core import failpoints
from core.artifacts import MANIFEST_FILE, Manifest, read_manifest, sha256_file, verify_files
from core.errors import Conflict, InvalidInput, NotFound, TunesmithError, Unavailable
from core.ids import new_id
from core.storage.bucket import Bucket
from core.storage.cache import ArtifactCache
from core.storage.disk import write_hashed
from core.storage.publications import (
    Publication,
    Publications,
    damaged,
    folder_of,
    missing,
    parse_folder,
)
from core.storage.reading import open_object
from core.storage.store import Blob, PublishedAdapter, StoredObject

_PUBLISH_TRIES = 5
# Stored again when it is older, so that nobody who removes old bytes takes it for forgotten.
_FRESH_SECONDS = 3600.0

_BLOBS = "blobs/"
_PROBE = "writable"
_UNFINISHED = "unfinished:"


class ObjectStore:
    """An artifact store in a bucket; see `ArtifactStore`.

    Args:
        bucket: Holds the artifacts.
        cache: Holds this machine's copies.
    """

    def __init__(self, bucket: Bucket, cache: ArtifactCache) -> None:
        self._bucket = bucket
        self._cache = cache
        self._publications = Publications(bucket)

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        """Store a stream of bytes; see `ArtifactStore`."""
        with self._cache.temporary_file("blob") as temporary:
            blob = write_hashed(temporary, chunks, max_bytes)
            name = _BLOBS + blob.sha256
            found = self._bucket.find(name)
            if found is None:
                self._bucket.create_file(name, temporary)
            elif found.bytes != blob.bytes or found.age_seconds > _FRESH_SECONDS:
                self._bucket.put_file(name, temporary)
            # It will be read here: checked, previewed, or gone on from. That is no need, though.
            with suppress(Unavailable):
                self._cache.adopt("blobs", blob.sha256, temporary)
        return blob

    def open_blob(self, sha256: str) -> BinaryIO:
        """Open stored bytes; see `ArtifactStore`."""
        return self.blob_path(sha256).open("rb")

    def blob_path(self, sha256: str) -> Path:
        """Return the path of this machine's copy; see `ArtifactStore`.

        Raises:
            Conflict: Code `artifact_damaged`; the stored bytes are not those that were written.
        """
        return self._cache.fetch("blobs", sha256, lambda target: self._load_blob(sha256, target))

    def has_blob(self, sha256: str) -> bool:
        """Tell whether bytes are stored; see `ArtifactStore`."""
        return self._bucket.find(_BLOBS + sha256) is not None

    def delete_blob(self, sha256: str) -> None:
        """Remove stored bytes; copies on other machines leave when nobody uses them."""
        self._bucket.delete(_BLOBS + sha256)
        self._cache.drop("blobs", sha256)

    def publish_adapter(self, source: Path) -> PublishedAdapter:
        """Store an artifact directory; see `ArtifactStore`."""
        manifest = read_manifest(source)
        verify_files(source, manifest)
        if not self._publications.exists(manifest.digest):
            self._publish(source, manifest)
        size = sum(file.bytes for file in manifest.files)
        return PublishedAdapter(manifest.digest, size, manifest)

    def adapter_path(self, digest: str) -> Path:
        """Return the directory of this machine's copy; see `ArtifactStore`.

        Raises:
            Conflict: Code `artifact_damaged`; the stored files are not those that were published.
        """
        return self._cache.fetch(
            "adapters", digest, lambda target: self._load_adapter(digest, target)
        )

    def open_adapter(self, digest: str) -> dict[str, BinaryIO]:
        """Open an adapter's files where they are, without a copy; see `ArtifactStore`."""
        publication = self._publications.get(digest)
        folder = folder_of(digest, publication.upload)
        files = {
            file.path: open_object(self._bucket, folder + file.path, file.bytes)
            for file in publication.manifest.files
        }
        files[MANIFEST_FILE] = io.BytesIO(publication.manifest_file)
        return {name: files[name] for name in sorted(files)}

    def has_adapter(self, digest: str) -> bool:
        """Tell whether an adapter is published; see `ArtifactStore`."""
        return self._publications.exists(digest)

    def delete_adapter(self, digest: str) -> None:
        """Remove an adapter, the manifest first; see `ArtifactStore`."""
        publication = None
        # A manifest that cannot be read leaves files that `list_temporary` names.
        with suppress(Conflict):
            publication = self._publications.find(digest)
        self._publications.delete_manifest(digest)
        if publication is not None:
            # Its own files only: another try to publish the same may be under way.
            self._publications.delete_files(folder_of(digest, publication.upload))
        self._cache.drop("adapters", digest)

    def list_blobs(self) -> Iterator[StoredObject]:
        """Yield all stored blobs."""
        for found in self._bucket.list(_BLOBS):
            yield StoredObject(found.name.removeprefix(_BLOBS), found.bytes, found.age_seconds)

    def list_adapters(self) -> Iterator[StoredObject]:
        """Yield all published adapters."""
        for tries in self._publications.tries():
            if tries.published_seconds is not None:
                counting = tries.uploads.get(self._publications.counting(tries) or "")
                size = counting.bytes if counting else 0
                yield StoredObject(tries.digest, size, tries.published_seconds)

    def list_temporary(self) -> Iterator[StoredObject]:
        """Yield tries to publish that do not count (yet), and unfinished uploads in parts."""
        for tries in self._publications.tries():
            counting = self._publications.counting(tries)
            for upload, found in tries.uploads.items():
                if upload != counting:
                    name = folder_of(tries.digest, upload)
                    yield StoredObject(name, found.bytes, found.age_seconds)
        for unfinished, upload_id in self._bucket.list_uploads(""):
            name = f"{_UNFINISHED}{upload_id}:{unfinished.name}"
            yield StoredObject(name, unfinished.bytes, unfinished.age_seconds)

    def delete_temporary(self, name: str) -> None:
        """Remove a leftover, unless it has come to count; see `ArtifactStore`."""
        if name.startswith(_UNFINISHED):
            upload_id, _, target = name.removeprefix(_UNFINISHED).partition(":")
            self._bucket.abort_upload(target, upload_id)
            return
        digest, upload = parse_folder(name)
        publication = self._publications.find(digest)
        if publication is None or publication.upload != upload:
            self._publications.delete_files(name)

    def check_writable(self) -> None:
        """Write a small object, and a small file beside the copies; see `ArtifactStore`."""
        self._cache.check_writable()
        self._bucket.put_bytes(_PROBE, b"0")
        if self._bucket.create_bytes(_PROBE, b"0"):
            raise Unavailable(
                "the artifact store writes over objects that it was told to keep",
                code="artifact_store_unavailable",
                retry_after_seconds=60,
                hint="It has to support conditional writes (If-None-Match), as S3 does.",
            )

    def _publish(self, source: Path, manifest: Manifest) -> None:
        publication = Publication(upload=new_id("upload"), manifest=manifest)
        folder = folder_of(manifest.digest, publication.upload)
        try:
            for number, file in enumerate(manifest.files):
                self._bucket.put_file(folder + file.path, source / file.path)
                if number == 0:
                    failpoints.reached("artifact.upload")
        except BaseException:
            with suppress(TunesmithError):
                self._publications.delete_files(folder)
            raise

        for _ in range(_PUBLISH_TRIES):
            # If this fails, nobody knows whether the manifest was written: the files have to stay.
            if self._publications.create(publication):
                return
            present = self._publications.find(manifest.digest)
            if present is not None:
                # It may be our own: an answer that got lost makes the client try again.
                if present.upload != publication.upload:
                    self._publications.delete_files(folder)
                return
        raise Unavailable(
            "an equal adapter is being deleted again and again",
            code="artifact_gone",
            hint="Publish it again.",
        )

    def _load_blob(self, sha256: str, target: Path) -> None:
        found = self._bucket.find(_BLOBS + sha256)
        if found is not None:
            self._cache.make_room(found.bytes)
        # Tried in any case: only this tells a missing object from a missing bucket.
        if not self._bucket.download(_BLOBS + sha256, target):
            raise NotFound(f"no stored bytes {sha256[:12]}…", code="blob_missing")
        if sha256_file(target) != sha256:
            raise damaged(f"the blob {sha256[:12]}…")

    def _load_adapter(self, digest: str, target: Path) -> None:
        publication = self._publications.get(digest)
        self._cache.make_room(publication.files_bytes)
        target.mkdir()
        for file in publication.manifest.files:
            name = folder_of(digest, publication.upload) + file.path
            if not self._bucket.download(name, target / file.path):
                # Deleted while it was read, or incomplete for good.
                if self._publications.find(digest) != publication:
                    raise missing(digest)
                raise damaged(f"the adapter {digest[:12]}…")
        (target / MANIFEST_FILE).write_bytes(publication.manifest_file)
        try:
            verify_files(target, publication.manifest)
        except InvalidInput as error:
            raise damaged(f"the adapter {digest[:12]}…") from error

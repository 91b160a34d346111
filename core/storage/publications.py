"""Which adapters a bucket holds: the manifests, and the tries to publish that they name.

    adapters/<digest>/<upload>/<file>    the files of one try to publish
    adapters/<digest>/manifest.json      written last, if there is none; names the try that counts

Without its manifest an adapter does not exist, however many of its files do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from core.artifacts import ARTIFACT_FILES, MANIFEST_FILE, Manifest
from core.errors import Conflict, NotFound
from core.storage.bucket import Bucket
from core.storage.store import StoredObject

_ADAPTERS = "adapters/"


class Publication(BaseModel):
    """What `adapters/<digest>/manifest.json` holds: which try counts, and the manifest proper."""

    upload: str
    manifest: Manifest

    @property
    def files_bytes(self) -> int:
        """Size of the files, the manifest aside."""
        return sum(file.bytes for file in self.manifest.files)

    @property
    def manifest_file(self) -> bytes:
        """What `manifest.json` holds in a directory of the adapter."""
        return self.manifest.model_dump_json(indent=2).encode() + b"\n"


@dataclass(frozen=True)
class Tries:
    """What lies under one digest; `published` is the age of its manifest, if it has one."""

    digest: str
    published_seconds: float | None
    uploads: dict[str, StoredObject]


class Publications:
    """The adapters of a bucket.

    Args:
        bucket: Holds them.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def exists(self, digest: str) -> bool:
        """Tell whether an adapter is published."""
        return self._bucket.find(_manifest_name(digest)) is not None

    def find(self, digest: str) -> Publication | None:
        """Return which try counts; `None` when the adapter is not published.

        Raises:
            Conflict: Code `artifact_damaged`; the manifest is not one of this adapter.
        """
        content = self._bucket.read(_manifest_name(digest))
        if content is None:
            return None
        what = f"the stored manifest of the adapter {digest[:12]}…"
        try:
            publication = Publication.model_validate_json(content)
        except ValueError as error:
            raise damaged(what) from error
        known = {file.path for file in publication.manifest.files} <= ARTIFACT_FILES
        if publication.manifest.digest != digest or not known or "/" in publication.upload:
            raise damaged(what)
        return publication

    def get(self, digest: str) -> Publication:
        """Return which try counts.

        Raises:
            NotFound: Code `adapter_files_missing`.
            Conflict: Code `artifact_damaged`.
        """
        publication = self.find(digest)
        if publication is None:
            raise missing(digest)
        return publication

    def create(self, publication: Publication) -> bool:
        """Have a try count, unless another does already; return whether none did."""
        content = publication.model_dump_json().encode()
        return self._bucket.create_bytes(_manifest_name(publication.manifest.digest), content)

    def delete_manifest(self, digest: str) -> None:
        """Unpublish an adapter; its files stay."""
        self._bucket.delete(_manifest_name(digest))

    def delete_files(self, folder: str) -> None:
        """Remove the files of a try."""
        for found in list(self._bucket.list(folder)):
            self._bucket.delete(found.name)

    def tries(self) -> Iterator[Tries]:
        """Yield what lies under each digest."""
        objects = self._bucket.list(_ADAPTERS)
        for digest, group in itertools.groupby(objects, key=lambda found: found.name.split("/")[1]):
            published_seconds: float | None = None
            uploads: dict[str, StoredObject] = {}
            for found in group:
                if found.name == _manifest_name(digest):
                    published_seconds = found.age_seconds
                    continue
                upload = found.name.split("/")[2]
                so_far = uploads.get(upload, StoredObject(upload, 0, found.age_seconds))
                uploads[upload] = StoredObject(
                    upload,
                    so_far.bytes + found.bytes,
                    min(so_far.age_seconds, found.age_seconds),
                )
            yield Tries(digest, published_seconds, uploads)

    def counting(self, tries: Tries) -> str | None:
        """Return which of the tries the manifest names, if there is a manifest."""
        if tries.published_seconds is None:
            return None
        if len(tries.uploads) == 1:
            # Files are removed after the manifest that names them, so it can be no other.
            return next(iter(tries.uploads))
        publication = self.find(tries.digest)
        return publication.upload if publication is not None else None


def folder_of(digest: str, upload: str) -> str:
    """Return what the names of a try's files begin with."""
    return f"{_ADAPTERS}{digest}/{upload}/"


def parse_folder(folder: str) -> tuple[str, str]:
    """Return digest and upload of what `folder_of` returned.

    Raises:
        ValueError: It is something else.
    """
    digest, _, upload = folder.removeprefix(_ADAPTERS).removesuffix("/").partition("/")
    if folder != folder_of(digest, upload) or not digest or not upload or "/" in upload:
        raise ValueError(f"{folder!r} names no leftover")
    return digest, upload


def missing(digest: str) -> NotFound:
    """Return the error for an adapter that is not published."""
    return NotFound(f"no stored adapter {digest[:12]}…", code="adapter_files_missing")


def damaged(what: str) -> Conflict:
    """Return the error for stored bytes that are not those that were written."""
    return Conflict(
        f"{what} cannot be used: the bytes are not those that were stored",
        code="artifact_damaged",
        hint="Restore the bucket from a backup, or train or import the adapter again.",
    )


def _manifest_name(digest: str) -> str:
    return f"{_ADAPTERS}{digest}/{MANIFEST_FILE}"

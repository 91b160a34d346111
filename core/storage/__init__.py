"""The artifact store: data set bytes, checkpoints and published adapters, by their content.

Owns the durability of objects and when they become visible: a reader sees all of one or nothing.
Knows no database: who may read or delete an object is decided by the callers.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from core.config import Settings
from core.errors import InvalidInput
from core.storage.disk import disk_errors
from core.storage.local import LocalStore
from core.storage.store import ArtifactStore, Blob, PublishedAdapter, StoredObject

__all__ = [
    "ArtifactStore",
    "Blob",
    "LocalStore",
    "PublishedAdapter",
    "StoredObject",
    "open_store",
]

_BUCKET_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def open_store(settings: Settings) -> ArtifactStore:
    """Return the store that the settings name; every process of the service uses the same.

    Raises:
        InvalidInput: Code `unknown_artifact_url`.
        Unavailable: Code `artifact_store_unavailable`; a directory cannot be made.
    """
    url = settings.artifact_url
    if not url:
        return LocalStore(settings.root)
    # Uploads are unpacked there, wherever they are stored afterwards.
    with disk_errors():
        (settings.root / "tmp").mkdir(parents=True, exist_ok=True)
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and _BUCKET_NAME.match(parts.netloc) and not parts.query:
        # Imported here: who keeps artifacts in a directory need not wait for it.
        from core.storage.bucket import Bucket
        from core.storage.cache import ArtifactCache
        from core.storage.object_store import ObjectStore

        cache = ArtifactCache(settings.root / "cache", settings.artifact_cache_bytes)
        return ObjectStore(Bucket(parts.netloc, unquote(parts.path)), cache)
    raise InvalidInput(
        f"{url!r} names no artifact store",
        code="unknown_artifact_url",
        field="TUNESMITH_ARTIFACT_URL",
        hint="Give s3://BUCKET/PREFIX or file:///DIRECTORY, or leave it empty.",
    )

"""Data sets between socket, store and database: each step in its own short session or none."""

from __future__ import annotations

import math
from typing import Any

from core import datasets, quotas
from core.data.check import check_file
from core.errors import TunesmithError
from core.principal import Principal
from core.reads import DatasetRead
from core.storage import Blob
from service.deps import Services
from service.schemas import RowRead
from service.uploads import Upload

_MAX_PREVIEW_DEPTH = 50


def store_dataset(services: Services, principal: Principal, upload: Upload) -> DatasetRead:
    """Store an upload, check it and register it; what is refused leaves no bytes behind.

    Raises:
        TooLarge: The file is longer than `max_upload_bytes`.
        InvalidInput: The file or some of its rows are unusable; see `core.data.check`.
        QuotaExceeded: The project would store more rows or bytes than it may.
    """
    blob = services.store.write_blob(upload, services.settings.max_upload_bytes)
    try:
        return _register(services, principal, upload.filename, blob)
    except TunesmithError:
        # An equal file may have been uploaded before, under a name that was accepted.
        datasets.discard_blob(services.database, services.store, blob.sha256)
        raise


def preview(
    services: Services, principal: Principal, dataset_id: str, offset: int, limit: int
) -> list[RowRead]:
    """Return rows of a data set with their line numbers.

    Raises:
        NotFound: Code `unknown_dataset`.
    """
    with services.database.session() as session:
        sha256 = datasets.get(session, principal, dataset_id).sha256
    # Fetched from a remote store, perhaps, and so while no session is open.
    services.store.blob_path(sha256)
    with services.database.session() as session:
        rows = datasets.preview(
            session, principal, services.store, dataset_id, offset=offset, limit=limit
        )
    return [RowRead(line=row["line"], row=_showable(row["row"])) for row in rows]


def delete_dataset(services: Services, principal: Principal, dataset_id: str) -> None:
    """Remove a data set, and its bytes if no other data set has the same.

    Raises:
        NotFound: Code `unknown_dataset`.
        Conflict: Code `dataset_in_use`.
    """
    with services.database.session(write=True) as session:
        sha256 = datasets.delete(session, principal, dataset_id)
    datasets.discard_blob(services.database, services.store, sha256)


def _showable(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON can carry it: fields that training ignores were never checked."""
    if depth > _MAX_PREVIEW_DEPTH:
        return "…"
    match value:
        case dict():
            return {_showable(key): _showable(member, depth + 1) for key, member in value.items()}
        case list():
            return [_showable(member, depth + 1) for member in value]
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case float() if not math.isfinite(value):
            return None
    return value


def _register(services: Services, principal: Principal, filename: str, blob: Blob) -> DatasetRead:
    path = services.store.blob_path(blob.sha256)
    report = check_file(path, filename, services.settings.max_dataset_rows)
    report.raise_for_errors()
    with services.database.session(write=True) as session:
        quotas.check_storage(
            session, principal, services.settings, rows=report.rows, bytes=blob.bytes
        )
        return datasets.create(
            session,
            principal,
            filename=filename,
            blob=blob,
            format=report.format,
            rows=report.rows,
            report=report.model_dump(mode="json"),
            store=services.store,
        )

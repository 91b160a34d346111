"""Data sets: rows in the database, bytes in the artifact store, shared between equal uploads."""

from __future__ import annotations

import re
from typing import Any, Literal

from sqlalchemy.orm import Session

from core.data.check import preview as preview_rows
from core.data.detect import DatasetFormat
from core.db.models import Dataset
from core.db.repositories.datasets import DatasetRepository, is_referenced
from core.db.repositories.dialect import lock_content
from core.db.session import Database
from core.errors import Conflict, Unavailable
from core.ids import new_id
from core.principal import Principal
from core.reads import DatasetRead, Page, decode_cursor, encode_cursor
from core.storage import ArtifactStore, Blob

_MAX_FILENAME = 255
_UNSTORABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def create(
    session: Session,
    principal: Principal,
    *,
    filename: str,
    blob: Blob,
    format: DatasetFormat | Literal["unknown"],  # noqa: A002 (named as the column it fills)
    rows: int,
    report: dict[str, Any],
    store: ArtifactStore,
) -> DatasetRead:
    """Register stored bytes that passed the check as a data set.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        filename: The name it was sent under; folders are cut off.
        blob: From the store.
        format: Format of the rows.
        rows: Number of rows.
        report: What the check found.
        store: Holds the blob.

    Raises:
        Unavailable: Code `blob_gone`; the same bytes were deleted meanwhile, so send them again.
    """
    return _to_read(
        add_row(
            session,
            principal,
            store,
            filename=filename,
            blob=blob,
            format=format,
            rows=rows,
            report=report,
        )
    )


def add_row(
    session: Session,
    principal: Principal,
    store: ArtifactStore,
    *,
    filename: str,
    blob: Blob,
    format: DatasetFormat | Literal["unknown"],  # noqa: A002 (named as the column it fills)
    rows: int,
    report: dict[str, Any],
) -> Dataset:
    """Insert the row of a data set; see `create`."""
    name = _UNSTORABLE.sub("", re.split(r"[/\\]", filename)[-1])[:_MAX_FILENAME]
    dataset = Dataset(
        id=new_id("file"),
        project_id=principal.project_id,
        filename=name or "upload",
        format=format,
        rows=rows,
        bytes=blob.bytes,
        sha256=blob.sha256,
        report=report,
    )
    # From here on nobody can find these bytes unreferenced and delete them.
    lock_content(session, blob.sha256)
    DatasetRepository(session, principal).add(dataset)
    if not store.has_blob(blob.sha256):
        raise Unavailable(
            "the upload was deleted while it was stored", code="blob_gone", hint="Send it again."
        )
    return dataset


def get(session: Session, principal: Principal, dataset_id: str) -> DatasetRead:
    """Return a data set.

    Raises:
        NotFound: Code `unknown_dataset`.
    """
    return _to_read(DatasetRepository(session, principal).get(dataset_id))


def list_datasets(
    session: Session, principal: Principal, *, cursor: str | None = None, limit: int = 20
) -> Page[DatasetRead]:
    """Return a page of data sets, newest first.

    Raises:
        InvalidInput: Code `invalid_cursor`.
    """
    before = decode_cursor(cursor) if cursor else None
    rows = DatasetRepository(session, principal).list(before=before, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    return Page(
        data=[_to_read(row) for row in shown],
        next_cursor=encode_cursor(shown[-1].id) if more else None,
    )


def delete(session: Session, principal: Principal, dataset_id: str) -> str:
    """Remove a data set; finished jobs that used it stay.

    The caller commits and then calls `discard_blob` with the hash returned.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        dataset_id: The data set.

    Raises:
        NotFound: Code `unknown_dataset`.
        Conflict: Code `dataset_in_use`; an unfinished job needs it.
    """
    datasets = DatasetRepository(session, principal)
    dataset = datasets.get(dataset_id, lock=True)
    if datasets.is_needed(dataset_id):
        raise Conflict(
            f"an unfinished job needs data set {dataset_id}",
            code="dataset_in_use",
            hint="Wait for the job or cancel it first.",
        )
    datasets.delete(dataset)
    return dataset.sha256


def discard_blob(database: Database, store: ArtifactStore, sha256: str) -> bool:
    """Delete stored bytes unless a data set of any project still has them.

    Returns:
        Whether they were deleted.
    """
    with database.session(write=True) as session:
        lock_content(session, sha256)
        if is_referenced(session, sha256):
            return False
        # Inside the transaction, so that no equal upload is registered between check and deletion.
        store.delete_blob(sha256)
        return True


def preview(
    session: Session,
    principal: Principal,
    store: ArtifactStore,
    dataset_id: str,
    *,
    offset: int = 0,
    limit: int = 20,
) -> list[dict[str, Any]]:
    """Return `{"line", "row"}` of up to `limit` rows after the first `offset`.

    With a remote store its bytes should be on this machine already: a session is open.

    Raises:
        NotFound: Code `unknown_dataset`.
    """
    dataset = DatasetRepository(session, principal).get(dataset_id)
    return preview_rows(store.blob_path(dataset.sha256), offset=offset, limit=limit)


def _to_read(row: Dataset) -> DatasetRead:
    return DatasetRead(**{name: getattr(row, name) for name in DatasetRead.model_fields})

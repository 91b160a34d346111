"""What the owner of an adapter asks for, and reads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from sqlalchemy.orm import Session

from core import quotas
from core.config import Settings
from core.datasets import discard_blob
from core.db.models import AdapterVersion, Export
from core.db.repositories.adapters import AdapterRepository
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.dialect import take_turn
from core.db.repositories.exports import ExportRepository
from core.db.session import Database
from core.errors import Conflict, InvalidInput
from core.ids import new_id
from core.principal import Principal
from core.reads import ExportRead, Page, decode_cursor, encode_cursor
from core.registry.views import version_row
from core.storage import ArtifactStore

ExportFormat = Literal["merged", "gguf"]
ExportDtype = Literal["fp32", "fp16", "bf16", "q8_0"]

_MOST_UNFINISHED = 20
# What an export is expected to take; a q8_0 block of 32 values has a scale of two bytes.
_BYTES_PER_PARAMETER = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


def submit_export(
    session: Session,
    principal: Principal,
    name: str,
    version: int,
    *,
    format: ExportFormat,  # noqa: A002 (named as the member of the body)
    dtype: ExportDtype,
    settings: Settings,
) -> ExportRead:
    """Ask for an export; the same request again gives the export that there is.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter's.
        version: Of it.
        format: `merged` or `gguf`.
        dtype: Of the weights.
        settings: Whether there is a converter, and the quotas.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_version`.
        InvalidInput: Code `gguf_unavailable` or `invalid_dtype`.
        QuotaExceeded: Too many exports of the project have not ended, or it would store too much.
    """
    row = version_row(AdapterRepository(session, principal.project_id), name, version)
    if format == "gguf" and not Path(settings.gguf_converter).is_file():
        raise InvalidInput(
            "this service cannot write GGUF",
            code="gguf_unavailable",
            field="format",
            hint="Export as `merged`, or ask the operator to set TUNESMITH_GGUF_CONVERTER.",
        )
    if format != "gguf" and dtype == "q8_0":
        raise InvalidInput(
            "q8_0 exists only in GGUF files",
            code="invalid_dtype",
            field="dtype",
            hint="Choose fp32, fp16 or bf16.",
        )
    # So that equal requests at the same time make one export.
    take_turn(session, f"export:{row.id}")
    exports = ExportRepository(session, principal.project_id)
    found = exports.find_same(row.id, format, dtype)
    if found is not None:
        return _to_read(name, row, found)
    _check_quotas(session, principal, exports, row, dtype, settings)
    export = Export(
        id=new_id("export"),
        project_id=principal.project_id,
        version_id=row.id,
        format=format,
        dtype=dtype,
    )
    exports.add(export)
    return _to_read(name, row, export)


def get_export(
    session: Session, principal: Principal, name: str, version: int, export_id: str
) -> ExportRead:
    """Return an export.

    Raises:
        NotFound: Code `unknown_adapter`, `unknown_version` or `unknown_export`.
    """
    row = version_row(AdapterRepository(session, principal.project_id), name, version)
    export = ExportRepository(session, principal.project_id).get(row.id, export_id)
    return _to_read(name, row, export)


def list_exports(
    session: Session,
    principal: Principal,
    name: str,
    version: int,
    *,
    cursor: str | None = None,
    limit: int = 20,
) -> Page[ExportRead]:
    """Return a page of a version's exports, newest first.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_version`.
        InvalidInput: Code `invalid_cursor`.
    """
    row = version_row(AdapterRepository(session, principal.project_id), name, version)
    before = decode_cursor(cursor) if cursor else None
    exports = ExportRepository(session, principal.project_id)
    rows = exports.list(row.id, before=before, limit=limit + 1)
    shown = rows[:limit]
    return Page(
        data=[_to_read(name, row, export) for export in shown],
        next_cursor=encode_cursor(shown[-1].id) if len(rows) > limit else None,
    )


def delete_export(
    database: Database,
    store: ArtifactStore,
    principal: Principal,
    name: str,
    version: int,
    export_id: str,
) -> None:
    """Remove an export and its file; one that is being made is given up.

    Raises:
        NotFound: Code `unknown_adapter`, `unknown_version` or `unknown_export`.
    """
    with database.session(write=True) as session:
        row = version_row(AdapterRepository(session, principal.project_id), name, version)
        exports = ExportRepository(session, principal.project_id)
        export = exports.get(row.id, export_id)
        sha256 = export.sha256
        exports.delete(export)
    if sha256 is not None:
        discard_blob(database, store, sha256)


def locate_file(export: ExportRead, store: ArtifactStore) -> tuple[Path, str]:
    """Return the path of an export's file, and the name to save it under.

    Raises:
        Conflict: Code `export_not_ready`.
        NotFound: The file is gone.
    """
    if export.sha256 is None:
        raise Conflict(
            f"the export is {export.status}",
            code="export_not_ready",
            hint="Wait until its status is `succeeded`.",
        )
    suffix = "tar" if export.format == "merged" else "gguf"
    name = f"{export.adapter}-v{export.version}-{export.dtype}.{suffix}"
    return store.blob_path(export.sha256), name


def _check_quotas(
    session: Session,
    principal: Principal,
    exports: ExportRepository,
    version: AdapterVersion,
    dtype: ExportDtype,
    settings: Settings,
) -> None:
    """Refuse one more export that would be too many, or too large beside those on their way."""
    unfinished = exports.list_unfinished()
    quotas.check_unfinished(len(unfinished), _MOST_UNFINISHED, what="exports")
    expected = sum(
        _expected_bytes(session, *one) for one in [(version.base_model, dtype), *unfinished]
    )
    quotas.check_storage(session, principal, settings, rows=0, bytes=expected)


def _expected_bytes(session: Session, base_model: str, dtype: str) -> int:
    base = BaseModelRepository(session).find(base_model)
    parameters = base.description.get("parameters", 0) if base else 0
    return int(parameters * _BYTES_PER_PARAMETER[dtype])


def _to_read(name: str, version: AdapterVersion, export: Export) -> ExportRead:
    return ExportRead(
        id=export.id,
        adapter=name,
        version=version.version,
        format=cast("ExportFormat", export.format),
        dtype=cast("ExportDtype", export.dtype),
        status=cast("Literal['queued', 'running', 'succeeded', 'failed']", export.status),
        attempt=export.attempt,
        bytes=export.bytes,
        sha256=export.sha256,
        error=export.error,
        created_at=export.created_at,
        finished_at=export.finished_at,
    )

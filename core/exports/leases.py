"""What a worker does with exports: claim, renew, end; every write is fenced by the attempt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from core import quotas
from core.config import Settings
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.dialect import lock_content
from core.db.repositories.exports import ExportClaims
from core.db.session import Database
from core.errors import TunesmithError, Unavailable
from core.principal import Principal
from core.storage import ArtifactStore, Blob


@dataclass(frozen=True)
class ExportClaim:
    """An export that a worker holds.

    Attributes:
        export_id: The export.
        attempt: Number of the attempt.
        project_id: The owner.
        format: `merged` or `gguf`.
        dtype: Of the weights.
        digest: Of the adapter.
        base_path: The base model's directory.
    """

    export_id: str
    attempt: int
    project_id: str
    format: str
    dtype: str
    digest: str
    base_path: str


def is_due(database: Database, absent: Collection[str] = ()) -> bool:
    """Tell whether an export waits whose base model is not among the `absent`."""
    with database.session() as session:
        return ExportClaims(session, "").is_due(absent)


def claim(
    database: Database,
    worker_id: str,
    *,
    lease_seconds: float,
    max_attempts: int,
    absent: Collection[str],
) -> ExportClaim | None:
    """Take the next export; those that lost too many attempts fail on the way.

    Args:
        database: Where.
        worker_id: Who takes it.
        lease_seconds: How long the first lease lasts.
        max_attempts: That may be lost.
        absent: Base models that this machine lacks.
    """
    while True:
        with database.session(write=True) as session:
            claims = ExportClaims(session, worker_id)
            found = claims.claim(lease_seconds, absent)
            if found is None:
                return None
            export, version = found
            if export.attempt > max_attempts:
                error = TunesmithError(
                    f"{max_attempts} attempts at this export were lost",
                    code="attempts_exhausted",
                    hint="The machine may have run out of memory for the whole base model.",
                )
                claims.end(export.id, export.attempt, "failed", error=error.as_dict())
                continue
            base = BaseModelRepository(session).find(version.base_model)
            if base is None or base.digest != version.base_digest:
                gone = TunesmithError(
                    f"the base model {version.base_model!r} is not what it was",
                    code="base_model_missing",
                )
                claims.end(export.id, export.attempt, "failed", error=gone.as_dict())
                continue
            return ExportClaim(
                export_id=export.id,
                attempt=export.attempt,
                project_id=export.project_id,
                format=export.format,
                dtype=export.dtype,
                digest=version.digest,
                base_path=base.path,
            )


def renew(database: Database, held: ExportClaim, worker_id: str, lease_seconds: float) -> None:
    """Extend the lease.

    Raises:
        LeaseLost: Another attempt owns the export, or it was deleted.
    """
    with database.session(write=True) as session:
        ExportClaims(session, worker_id).renew(held.export_id, held.attempt, lease_seconds)


def succeed(
    database: Database,
    held: ExportClaim,
    worker_id: str,
    blob: Blob,
    store: ArtifactStore,
    settings: Settings,
) -> None:
    """End an export with its file.

    Args:
        database: Where.
        held: The export.
        worker_id: Who made it.
        blob: The file.
        store: Holds it.
        settings: The quotas.

    Raises:
        LeaseLost: Another attempt owns the export, or it was deleted.
        QuotaExceeded: The project would store too much.
        Unavailable: Code `artifact_gone`; an equal file was deleted at this very moment.
    """
    owner = Principal(held.project_id, frozenset())
    with database.session(write=True) as session:
        quotas.check_storage(session, owner, settings, rows=0, bytes=blob.bytes)
        lock_content(session, blob.sha256)
        if not store.has_blob(blob.sha256):
            raise Unavailable("the file was deleted meanwhile", code="artifact_gone")
        ExportClaims(session, worker_id).end(
            held.export_id, held.attempt, "succeeded", sha256=blob.sha256, bytes=blob.bytes
        )


def fail(database: Database, held: ExportClaim, worker_id: str, error: dict[str, Any]) -> None:
    """End an export with an error.

    Raises:
        LeaseLost: Another attempt owns the export, or it was deleted.
    """
    shown = {name: value for name, value in error.items() if name != "kind"}
    with database.session(write=True) as session:
        ExportClaims(session, worker_id).end(held.export_id, held.attempt, "failed", error=shown)


def hand_back(database: Database, held: ExportClaim, worker_id: str, *, counted: bool) -> None:
    """Let an export wait again, as a lost attempt or, for a shutdown, as none.

    Raises:
        LeaseLost: Another attempt owns the export, or it was deleted.
    """
    with database.session(write=True) as session:
        ExportClaims(session, worker_id).hand_back(held.export_id, held.attempt, counted=counted)


def held_attempts(database: Database) -> set[tuple[str, int]]:
    """Return (id, attempt) of all exports that some worker makes."""
    with database.session() as session:
        return ExportClaims(session, "").list_held()

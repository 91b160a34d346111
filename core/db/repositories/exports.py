"""Exports of adapter versions: the owner's view, and that of the workers that make them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, Export, utc_now
from core.db.repositories.dialect import is_key, take_turn
from core.db.types import database_epoch
from core.errors import LeaseLost, NotFound

_UNFINISHED = ("queued", "running")


class ExportRepository:
    """Exports of one project.

    Args:
        session: Where the queries run.
        project_id: The owner.
    """

    def __init__(self, session: Session, project_id: str) -> None:
        self._session = session
        self._project_id = project_id

    def add(self, export: Export) -> None:
        """Insert an export."""
        self._session.add(export)
        self._session.flush()

    def find_same(self, version_id: str, format: str, dtype: str) -> Export | None:  # noqa: A002
        """Return an export of a version that is made or being made with these options."""
        return self._session.scalars(
            select(Export)
            .where(
                Export.project_id == self._project_id,
                Export.version_id == version_id,
                Export.format == format,
                Export.dtype == dtype,
                Export.status != "failed",
            )
            .limit(1)
        ).first()

    def get(self, version_id: str, export_id: str) -> Export:
        """Return an export of a version.

        Raises:
            NotFound: Code `unknown_export`.
        """
        found = None
        if is_key(export_id):
            found = self._session.scalars(
                select(Export).where(
                    Export.id == export_id,
                    Export.version_id == version_id,
                    Export.project_id == self._project_id,
                )
            ).one_or_none()
        if found is None:
            raise NotFound(
                f"no export {export_id!r}",
                code="unknown_export",
                hint="One is kept for some days; ask for it again.",
            )
        return found

    def list(self, version_id: str, *, before: str | None, limit: int) -> Sequence[Export]:
        """Return exports of a version, newest first."""
        query = select(Export).where(
            Export.version_id == version_id, Export.project_id == self._project_id
        )
        if before is not None:
            query = query.where(Export.id < before)
        return self._session.scalars(query.order_by(Export.id.desc()).limit(limit)).all()

    def list_unfinished(self) -> Sequence[tuple[str, str]]:
        """Return base model and dtype of those that wait or are being made."""
        rows = self._session.execute(
            select(AdapterVersion.base_model, Export.dtype)
            .join(AdapterVersion, AdapterVersion.id == Export.version_id)
            .where(Export.project_id == self._project_id, Export.status.in_(_UNFINISHED))
        )
        return [(row[0], row[1]) for row in rows]

    def delete(self, export: Export) -> None:
        """Delete an export; a worker that makes it finds its lease lost."""
        self._session.delete(export)
        self._session.flush()


class ExportClaims:
    """Exports of all projects, as one worker sees them.

    Args:
        session: Where the queries run.
        worker_id: The worker.
    """

    def __init__(self, session: Session, worker_id: str) -> None:
        self._session = session
        self._worker_id = worker_id

    def is_due(self, absent: Collection[str]) -> bool:
        """Tell whether an export waits whose base model this machine has."""
        return self._session.scalar(self._due(absent).with_only_columns(Export.id)) is not None

    def claim(
        self, lease_seconds: float, absent: Collection[str]
    ) -> tuple[Export, AdapterVersion] | None:
        """Take the oldest export that waits, or whose worker vanished.

        Args:
            lease_seconds: How long the first lease lasts.
            absent: Base models that this machine lacks.
        """
        take_turn(self._session, "claim:export")
        export = self._session.scalars(self._due(absent)).first()
        if export is None:
            return None
        self._session.execute(
            update(Export)
            .where(Export.id == export.id)
            .values(
                status="running",
                attempt=Export.attempt + 1,
                worker_id=self._worker_id,
                lease_expires_epoch=database_epoch() + lease_seconds,
            )
            .execution_options(synchronize_session=False)
        )
        self._session.refresh(export)
        version = self._session.get(AdapterVersion, export.version_id)
        assert version is not None  # the foreign key says so
        return export, version

    def renew(self, export_id: str, attempt: int, lease_seconds: float) -> None:
        """Extend a lease.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        self._write(export_id, attempt, lease_expires_epoch=database_epoch() + lease_seconds)

    def end(self, export_id: str, attempt: int, status: str, **values: Any) -> None:
        """End an export as `succeeded` or `failed`.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        self._write(
            export_id,
            attempt,
            status=status,
            finished_at=utc_now(),
            worker_id=None,
            lease_expires_epoch=None,
            **values,
        )

    def hand_back(self, export_id: str, attempt: int, *, counted: bool) -> None:
        """Let an export wait again.

        Args:
            export_id: The export.
            attempt: That the worker holds.
            counted: Whether the attempt counts towards the limit.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        self._write(
            export_id,
            attempt,
            status="queued",
            worker_id=None,
            lease_expires_epoch=None,
            attempt=attempt if counted else attempt - 1,
        )

    def list_held(self) -> set[tuple[str, int]]:
        """Return (id, attempt) of all exports that some worker makes."""
        rows = self._session.execute(
            select(Export.id, Export.attempt).where(Export.status == "running")
        )
        return {(row[0], row[1]) for row in rows}

    def _due(self, absent: Collection[str]) -> Any:
        return (
            select(Export)
            .join(AdapterVersion, AdapterVersion.id == Export.version_id)
            .where(
                or_(
                    Export.status == "queued",
                    and_(Export.status == "running", Export.lease_expires_epoch < database_epoch()),
                ),
                AdapterVersion.base_model.not_in(absent),
            )
            .order_by(Export.id)
            .limit(1)
        )

    def _write(self, export_id: str, attempt: int, /, **values: Any) -> None:
        written = self._session.execute(
            update(Export)
            .where(
                Export.id == export_id,
                Export.attempt == attempt,
                Export.worker_id == self._worker_id,
                Export.status == "running",
            )
            .values(**values)
            .returning(Export.id)
            .execution_options(synchronize_session=False)
        ).first()
        if written is None:
            raise LeaseLost(f"attempt {attempt} of {export_id} is no longer this worker's")


def remove_ended(session: Session, ended_before: datetime, limit: int) -> Sequence[Export]:
    """Delete exports that ended before an instant; return what they were."""
    due = session.scalars(
        select(Export)
        .where(Export.finished_at < ended_before)
        .order_by(Export.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if due:
        session.execute(
            delete(Export)
            .where(Export.id.in_([export.id for export in due]))
            .execution_options(synchronize_session=False)
        )
    return due


def count_ended(session: Session, ended_before: datetime) -> tuple[int, int]:
    """Return number and bytes of the exports that `remove_ended` would delete in the end."""
    row = session.execute(
        select(func.count(), func.coalesce(func.sum(Export.bytes), 0)).where(
            Export.finished_at < ended_before
        )
    ).one()
    return row[0], int(row[1] or 0)

"""Removes rows that have outlived their time, and what only they referred to in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from core import datasets
from core.config import Settings
from core.db.models import utc_now
from core.db.repositories.exports import count_ended, remove_ended
from core.db.repositories.housekeeping import HousekeepingRepository
from core.db.session import Database
from core.housekeeping.report import Kind, Report
from core.storage import ArtifactStore

_JOBS = 100
_ROWS = 2000
_DRY_RUN_SECONDS = 86_400.0


@dataclass(frozen=True)
class _Batch:
    """What one transaction removed.

    Attributes:
        rows: How many rows.
        more: Whether there may be more to remove.
        files: SHA-256 and bytes of what they had stored.
    """

    rows: int
    more: bool
    files: Sequence[tuple[str | None, int]] = ()


@dataclass(frozen=True)
class _Removal:
    """One way of removing, again and again until nothing is left.

    Attributes:
        remove: Removes a batch, in a transaction of its own.
        rows_as: What the rows count as; nobody has them counted without.
        files_as: Likewise of the files.
    """

    remove: Callable[[], _Batch]
    rows_as: Kind | None = None
    files_as: Kind | None = None


def count_expired(database: Database, settings: Settings, report: Report) -> None:
    """Count what `remove_expired` would remove now."""
    with database.session() as session:
        rows = HousekeepingRepository(session)
        removed = report.removed
        removed["checkpoints"].add(*rows.count_checkpoints(_ago(settings.keep_checkpoints_seconds)))
        if settings.keep_jobs_seconds:
            removed["jobs"].add(rows.count_jobs(_ago(settings.keep_jobs_seconds)))
        removed["exports"].add(*count_ended(session, _ago(settings.keep_exports_seconds)))
        removed["deliveries"].add(rows.count_deliveries(settings.keep_deliveries_seconds))
        removed["idempotency_keys"].add(
            rows.count_idempotency_keys(_ago(settings.keep_idempotency_seconds))
        )


def remove_expired(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    report: Report,
    pause: Callable[[], None],
) -> None:
    """Remove checkpoints, jobs, exports, deliveries and keys that are past the time they are kept.

    Dry runs go as well; nobody has them counted.

    Args:
        database: Where.
        store: Holds checkpoints and exports.
        settings: How long what is kept.
        report: Counts what was removed.
        pause: Called between two transactions.
    """
    for removal in _removals(database, settings):
        while _remove_batch(removal, database, store, report):
            pause()


def _remove_batch(
    removal: _Removal, database: Database, store: ArtifactStore, report: Report
) -> bool:
    """Remove some; tell whether there may be more."""
    batch = removal.remove()
    if removal.rows_as:
        report.removed[removal.rows_as].add(batch.rows)
    for sha256, size in batch.files:
        if sha256 is not None:
            # A crash before this line leaves an unreferenced blob, which the collection finds.
            datasets.discard_blob(database, store, sha256)
        if removal.files_as:
            report.removed[removal.files_as].add(1, size)
    return batch.more


def _removals(database: Database, settings: Settings) -> Iterator[_Removal]:
    yield _Removal(_Checkpoints(database, settings), files_as="checkpoints")
    if settings.keep_jobs_seconds:
        jobs_before = _ago(settings.keep_jobs_seconds)
        yield _Removal(lambda: _remove_jobs(database, jobs_before), "jobs", "checkpoints")
    exports_before = _ago(settings.keep_exports_seconds)
    yield _Removal(lambda: _remove_exports(database, exports_before), files_as="exports")
    dry_runs_before = _ago(_DRY_RUN_SECONDS)
    yield _Removal(
        lambda: _remove_rows(database, lambda rows: rows.remove_dry_runs(dry_runs_before, _ROWS))
    )
    yield _Removal(
        lambda: _remove_rows(
            database,
            lambda rows: rows.remove_deliveries(settings.keep_deliveries_seconds, _ROWS),
        ),
        "deliveries",
    )
    keys_before = _ago(settings.keep_idempotency_seconds)
    yield _Removal(
        lambda: _remove_rows(
            database, lambda rows: rows.remove_idempotency_keys(keys_before, _ROWS)
        ),
        "idempotency_keys",
    )


class _Checkpoints:
    """Removes checkpoints in the order of their jobs' ids."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._ended_before = _ago(settings.keep_checkpoints_seconds)
        self._last = ""

    def __call__(self) -> _Batch:
        # Looked for without a lock: there may be many that are still needed to pass by.
        with self._database.session() as session:
            ids = HousekeepingRepository(session).list_done_with_checkpoints(
                self._ended_before, after=self._last, limit=_JOBS
            )
        if not ids:
            return _Batch(0, more=False)
        self._last = ids[-1]
        with self._database.session(write=True) as session:
            removed = HousekeepingRepository(session).remove_checkpoints(ids, self._ended_before)
            files = [(row.sha256, row.bytes) for row in removed]
        return _Batch(len(files), more=True, files=files)


def _remove_jobs(database: Database, ended_before: datetime) -> _Batch:
    with database.session(write=True) as session:
        batch = HousekeepingRepository(session).remove_jobs(ended_before, jobs=_JOBS, rows=_ROWS)
    return _Batch(batch.jobs, batch.more, batch.checkpoints)


def _remove_exports(database: Database, ended_before: datetime) -> _Batch:
    with database.session(write=True) as session:
        removed = remove_ended(session, ended_before, _JOBS)
        files = [(export.sha256, export.bytes or 0) for export in removed]
    return _Batch(len(files), len(files) == _JOBS, files)


def _remove_rows(database: Database, remove: Callable[[HousekeepingRepository], int]) -> _Batch:
    with database.session(write=True) as session:
        rows = remove(HousekeepingRepository(session))
    return _Batch(rows, rows == _ROWS)


def _ago(seconds: float) -> datetime:
    return utc_now() - timedelta(seconds=seconds)

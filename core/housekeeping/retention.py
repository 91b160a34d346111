"""Removes rows that have outlived their time, and what only they referred to in the store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from core import datasets
from core.config import Settings
from core.db.models import utc_now
from core.db.repositories.exports import count_ended, remove_ended
from core.db.repositories.housekeeping import HousekeepingRepository
from core.db.session import Database
from core.housekeeping.report import Report
from core.storage import ArtifactStore

_JOBS = 100
_ROWS = 2000
_DRY_RUN_SECONDS = 86_400.0


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
        store: Holds checkpoints.
        settings: How long what is kept.
        report: Counts what was removed.
        pause: Called between two transactions.
    """
    _remove_checkpoints(database, store, settings, report, pause)
    if settings.keep_jobs_seconds:
        _remove_jobs(database, store, settings, report, pause)
    _remove_exports(database, store, settings, report, pause)
    keys_before = _ago(settings.keep_idempotency_seconds)
    dry_runs_before = _ago(_DRY_RUN_SECONDS)
    _in_batches(
        database,
        lambda rows: rows.remove_dry_runs(dry_runs_before, _ROWS),
        lambda _: None,
        pause,
    )
    _in_batches(
        database,
        lambda rows: rows.remove_deliveries(settings.keep_deliveries_seconds, _ROWS),
        report.removed["deliveries"].add,
        pause,
    )
    _in_batches(
        database,
        lambda rows: rows.remove_idempotency_keys(keys_before, _ROWS),
        report.removed["idempotency_keys"].add,
        pause,
    )


def _remove_checkpoints(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    report: Report,
    pause: Callable[[], None],
) -> None:
    ended_before, last = _ago(settings.keep_checkpoints_seconds), ""
    while True:
        # Looked for without a lock: there may be many that are still needed to pass by.
        with database.session() as session:
            ids = HousekeepingRepository(session).list_done_with_checkpoints(
                ended_before, after=last, limit=_JOBS
            )
        if not ids:
            return
        with database.session(write=True) as session:
            removed = HousekeepingRepository(session).remove_checkpoints(ids, ended_before)
        for row in removed:
            _discard(database, store, row.sha256)
            report.removed["checkpoints"].add(1, row.bytes)
        last = ids[-1]
        pause()


def _remove_exports(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    report: Report,
    pause: Callable[[], None],
) -> None:
    ended_before = _ago(settings.keep_exports_seconds)
    while True:
        with database.session(write=True) as session:
            removed = remove_ended(session, ended_before, _JOBS)
            files = [(export.sha256, export.bytes or 0) for export in removed]
        for sha256, size in files:
            if sha256 is not None:
                _discard(database, store, sha256)
            report.removed["exports"].add(1, size)
        if len(files) < _JOBS:
            return
        pause()


def _remove_jobs(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    report: Report,
    pause: Callable[[], None],
) -> None:
    ended_before = _ago(settings.keep_jobs_seconds)
    while True:
        with database.session(write=True) as session:
            batch = HousekeepingRepository(session).remove_jobs(
                ended_before, jobs=_JOBS, rows=_ROWS
            )
        report.removed["jobs"].add(batch.jobs)
        for sha256, size in batch.checkpoints:
            _discard(database, store, sha256)
            report.removed["checkpoints"].add(1, size)
        if not batch.more:
            return
        pause()


def _in_batches(
    database: Database,
    remove: Callable[[HousekeepingRepository], int],
    count: Callable[[int], None],
    pause: Callable[[], None],
) -> None:
    while True:
        with database.session(write=True) as session:
            removed = remove(HousekeepingRepository(session))
        count(removed)
        if removed < _ROWS:
            return
        pause()


def _discard(database: Database, store: ArtifactStore, sha256: str) -> None:
    # A crash before this line leaves an unreferenced blob, which the collection finds.
    datasets.discard_blob(database, store, sha256)


def _ago(seconds: float) -> datetime:
    return utc_now() - timedelta(seconds=seconds)

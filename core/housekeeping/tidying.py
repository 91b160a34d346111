"""One round of housekeeping, and who performs it."""

from __future__ import annotations

import time

from core.config import Settings
from core.db.repositories.workers import LeaseRepository
from core.db.session import Database
from core.errors import LeaseLost
from core.housekeeping.garbage import collect_garbage
from core.housekeeping.report import Report
from core.housekeeping.retention import count_expired, remove_expired
from core.logging import get_logger
from core.storage import ArtifactStore

_DUTY = "housekeeping"
_LEASE_SECONDS = 120.0
_RENEW_EVERY_SECONDS = 30.0
# SQLite has one writer at a time; between two removals the others get their turn.
_PAUSE_SECONDS = 0.02

log = get_logger(__name__)


def tidy(
    database: Database, store: ArtifactStore, settings: Settings, holder: str
) -> Report | None:
    """Remove all that is past its time, unless another process does or has just done so.

    The duty is kept until the next round is due, so that a round happens once, however many
    processes take part.

    Args:
        database: Where.
        store: Where.
        settings: How long what is kept.
        holder: Names this process.

    Returns:
        What was removed; `None` when another process has the duty.
    """
    # Below the interval, so that the next round of the same process finds it free or its own.
    rest_seconds = 0.9 * settings.gc_interval_seconds
    if not _take(database, holder, _LEASE_SECONDS):
        return None
    renewed_at = time.monotonic()

    def pause() -> None:
        nonlocal renewed_at
        time.sleep(_PAUSE_SECONDS)
        if time.monotonic() - renewed_at > _RENEW_EVERY_SECONDS:
            if not _take(database, holder, _LEASE_SECONDS):
                raise LeaseLost("another process does the housekeeping")
            renewed_at = time.monotonic()

    report = Report()
    try:
        remove_expired(database, store, settings, report, pause)
        collect_garbage(database, store, settings.gc_grace_seconds, report, pause=pause)
    except LeaseLost:
        return report
    _take(database, holder, rest_seconds)
    counts = {kind: removed.count for kind, removed in report.removed.items() if removed.count}
    if counts:
        log.info("housekeeping_done", **counts)
    if report.refused:
        log.error("garbage_collection_refused", reason=report.refused)
    return report


def clean(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    *,
    dry_run: bool = False,
    force: bool = False,
) -> Report:
    """Remove all that is past its time, now and whoever else does.

    Args:
        database: Where.
        store: Where.
        settings: How long what is kept.
        dry_run: Count, remove nothing.
        force: Remove even though the store looks like that of another database.
    """
    report = Report()

    def pause() -> None:
        time.sleep(_PAUSE_SECONDS)

    if dry_run:
        count_expired(database, settings, report)
    else:
        remove_expired(database, store, settings, report, pause)
    collect_garbage(
        database,
        store,
        settings.gc_grace_seconds,
        report,
        dry_run=dry_run,
        force=force,
        pause=pause,
    )
    return report


def _take(database: Database, holder: str, seconds: float) -> bool:
    with database.session(write=True) as session:
        return LeaseRepository(session).take(_DUTY, holder, seconds)

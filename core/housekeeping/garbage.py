"""Removes stored objects that no row refers to, and what interrupted writers left behind.

An upload, a checkpoint and an adapter are stored first and registered afterwards, so an object
without a reference may be one that is about to get it. Its age tells: what is younger than the
grace period stays. Where that guess is wrong, nothing is lost silently: reference and bytes are
checked under one lock by whoever registers and by whoever deletes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from core import datasets, registry
from core.db.repositories.housekeeping import HousekeepingRepository
from core.db.session import Database
from core.housekeeping.report import Kind, Report
from core.storage import ArtifactStore, StoredObject

_BATCH = 500
_PAUSE_EVERY = 20
# A writer touches its temporary files all the time; none is silent for so long.
_MIN_TEMPORARY_AGE_SECONDS = 3600.0
# So many crashes between storing and registering do not happen within a grace period.
_MANY = 100

_Known = Callable[[HousekeepingRepository, Sequence[str]], set[str]]
_Discard = Callable[[Database, ArtifactStore, str], bool]


@dataclass
class _Found:
    """What the store holds of one kind: what is referenced, and what is old and is not."""

    referenced: int
    unreferenced: list[StoredObject]


def collect_garbage(
    database: Database,
    store: ArtifactStore,
    grace_seconds: float,
    report: Report,
    *,
    dry_run: bool = False,
    force: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Remove what nothing refers to and what is older than the grace period.

    Safe while jobs run and uploads happen, whatever the grace period: too short a one makes an
    upload fail with a retryable error, never lose its bytes.

    Args:
        database: Knows what is referenced.
        store: What is cleaned; it belongs to this database alone.
        grace_seconds: How old an object without a reference must be.
        report: Counts what was removed.
        dry_run: Count, remove nothing.
        force: Remove even though the store looks like that of another database.
        pause: Called between removals.
    """
    blobs = _find(
        database, store.list_blobs(), HousekeepingRepository.referenced_blobs, grace_seconds
    )
    adapters = _find(
        database, store.list_adapters(), HousekeepingRepository.referenced_adapters, grace_seconds
    )
    report.refused = None if force else _suspicion(blobs, adapters)
    if report.refused is None:
        kinds: tuple[tuple[Kind, _Found, _Discard], ...] = (
            ("blobs", blobs, datasets.discard_blob),
            ("adapters", adapters, registry.discard_artifact),
        )
        for kind, found, discard in kinds:
            for number, candidate in enumerate(found.unreferenced, 1):
                if dry_run or discard(database, store, candidate.name):
                    report.removed[kind].add(1, candidate.bytes)
                if number % _PAUSE_EVERY == 0:
                    pause()
    for leftover in store.list_temporary():
        if leftover.age_seconds >= max(grace_seconds, _MIN_TEMPORARY_AGE_SECONDS):
            if not dry_run:
                store.delete_temporary(leftover.name)
            report.removed["temporary"].add(1, leftover.bytes)


def _find(
    database: Database, objects: Iterable[StoredObject], known: _Known, grace_seconds: float
) -> _Found:
    found = _Found(0, [])
    batch: list[StoredObject] = []

    def look_up() -> None:
        with database.session() as session:
            names = known(HousekeepingRepository(session), [entry.name for entry in batch])
        found.referenced += len(names)
        found.unreferenced += (
            entry
            for entry in batch
            if entry.name not in names and entry.age_seconds >= grace_seconds
        )
        batch.clear()

    for entry in objects:
        batch.append(entry)
        if len(batch) == _BATCH:
            look_up()
    look_up()
    return found


def _suspicion(*kinds: _Found) -> str | None:
    """Say why this store does not look like ours; a mistyped address must not empty another's."""
    referenced = sum(found.referenced for found in kinds)
    unreferenced = sum(len(found.unreferenced) for found in kinds)
    if unreferenced and (not referenced or unreferenced > max(referenced, _MANY)):
        return (
            f"the database refers to {referenced} of the objects in the store and not to "
            f"{unreferenced} others"
        )
    return None

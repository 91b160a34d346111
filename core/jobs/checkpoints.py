"""Checkpoints of a running job: stored, kept to a number, found again, or found damaged.

The bytes of a checkpoint are a blob of the artifact store, named by its hash, so that a later
attempt knows whether it has them whole. Every write here is fenced like all writes of a worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from core import datasets
from core.db.models import Job, JobCheckpoint
from core.db.repositories.checkpoints import CheckpointRepository
from core.db.repositories.claims import ClaimRepository
from core.db.repositories.dialect import lock_content
from core.db.repositories.history import HistoryRepository
from core.db.session import Database
from core.errors import Unavailable
from core.storage import ArtifactStore, Blob

if TYPE_CHECKING:
    from core.jobs.leases import Claim


@dataclass(frozen=True)
class CheckpointRef:
    """A stored checkpoint: after which step of which attempt, and its archive's blob."""

    step: int
    attempt: int
    sha256: str
    bytes: int


def usable_checkpoints(session: Session, job: Job) -> tuple[CheckpointRef, ...]:
    """Return the checkpoints of a job that were not found damaged, the newest first."""
    return tuple(
        CheckpointRef(row.step, row.attempt, row.sha256, row.bytes)
        for row in CheckpointRepository(session, job.id).list()
        if row.invalid_reason is None
    )


def add_checkpoint(
    database: Database,
    claim: Claim,
    worker_id: str,
    *,
    step: int,
    blob: Blob,
    store: ArtifactStore,
) -> None:
    """Register a stored checkpoint, and forget those that are more than the job shall keep.

    Args:
        database: Where.
        claim: The attempt that made it.
        worker_id: Who holds the attempt.
        step: The optimizer step after which it was made.
        blob: Its archive, which the store holds already.
        store: Loses the archives of forgotten checkpoints.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
        Unavailable: Code `checkpoint_gone`; the blob was removed meanwhile: store it again.
    """
    event = ("checkpoint_saved", {"step": step, "bytes": blob.bytes})
    with database.session(write=True) as session:
        # From here on nobody can find these bytes unreferenced and delete them.
        lock_content(session, blob.sha256)
        ClaimRepository(session, worker_id).write(claim.job_id, claim.attempt, claim.stage, [event])
        checkpoints = CheckpointRepository(session, claim.job_id)
        checkpoints.add(
            JobCheckpoint(
                job_id=claim.job_id,
                step=step,
                attempt=claim.attempt,
                sha256=blob.sha256,
                bytes=blob.bytes,
            )
        )
        surplus = checkpoints.list()[claim.spec.training.save_total_limit :]
        checkpoints.remove(surplus)
        if not store.has_blob(blob.sha256):
            raise Unavailable("the checkpoint was deleted meanwhile", code="checkpoint_gone")
    for row in surplus:
        datasets.discard_blob(database, store, row.sha256)


def reject_checkpoint(
    database: Database, claim: Claim, worker_id: str, *, checkpoint: CheckpointRef, reason: str
) -> None:
    """Note that a checkpoint is damaged; no attempt will try it again.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    event = ("checkpoint_skipped", {"step": checkpoint.step, "reason": reason})
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).write(claim.job_id, claim.attempt, claim.stage, [event])
        CheckpointRepository(session, claim.job_id).reject(
            checkpoint.step, checkpoint.attempt, reason
        )


def begin_training(
    database: Database, claim: Claim, worker_id: str, *, resumed: CheckpointRef | None
) -> None:
    """Note where an attempt begins; measurements of steps that it does again are dropped.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    step = resumed.step if resumed else 0
    events = [("resumed", {"step": step, "from_attempt": resumed.attempt})] if resumed else []
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).write(
            claim.job_id, claim.attempt, claim.stage, events, step=step
        )
        HistoryRepository(session).drop_metrics(
            claim.job_id, after_step=step if resumed else -1, before_attempt=claim.attempt
        )

"""Finds jobs whose worker vanished, and keeps the list of workers."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from core.capabilities import ANY, Capabilities
from core.db.models import Job
from core.db.repositories.claims import ClaimRepository
from core.db.repositories.workers import LeaseRepository, WorkerRepository
from core.db.session import Database
from core.errors import TrainingFailed
from core.jobs.leases import Claim
from core.reads import WorkerRead

_BATCH = 100
_FORGET_AFTER_LEASES = 20


def sweep(database: Database, holder: str, lease_seconds: float, max_attempts: int) -> int:
    """Let jobs with an expired lease wait again; fail those that lost too many workers.

    One process at a time does this: the first to take the duty keeps it for `lease_seconds`.

    Returns:
        How many jobs were found; 0 when another process has the duty.
    """
    with database.session(write=True) as session:
        if not LeaseRepository(session).take("sweep", holder, lease_seconds):
            return 0
        WorkerRepository(session).forget_silent(_FORGET_AFTER_LEASES * lease_seconds)
        claims = ClaimRepository(session, holder)
        expired = claims.list_expired(_BATCH)
        for job in expired:
            _lose_attempt(claims, job, "its worker vanished", max_attempts)
        return len(expired)


def attempt_lost(
    database: Database,
    claim: Claim,
    worker_id: str,
    *,
    reason: str,
    max_attempts: int,
    next_rung: int | None = None,
) -> None:
    """Count an attempt whose process died under a live worker; the job waits again or fails.

    Args:
        database: Where.
        claim: The attempt.
        worker_id: Who holds it.
        reason: How the process ended.
        max_attempts: With this many lost attempts the job fails, `attempts_exhausted`.
        next_rung: Of the memory ladder, for an attempt that ran out of memory.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    with database.session(write=True) as session:
        claims = ClaimRepository(session, worker_id)
        job = claims.write(claim.job_id, claim.attempt, claim.stage)
        _lose_attempt(claims, job, reason, max_attempts, next_rung)


def held_attempts(database: Database) -> set[tuple[str, int]]:
    """Return (job id, attempt) of all attempts that a worker holds, be it alive or not."""
    with database.session() as session:
        return ClaimRepository(session, "").list_held()


def _lose_attempt(
    claims: ClaimRepository,
    job: Job,
    reason: str,
    max_attempts: int,
    next_rung: int | None = None,
) -> None:
    smaller = next_rung is not None and next_rung > job.memory_rung
    # The ladder ends by itself; an attempt that goes on with less memory is not a lost one.
    lost = job.lost_attempts + (0 if smaller else 1)
    if lost >= max_attempts and job.stop_requested != "cancel":
        error = TrainingFailed(
            f"{lost} attempts at this job were lost, the last because {reason}",
            code="attempts_exhausted",
            hint="The machine may have run out of memory; try a smaller batch or max_length.",
        )
        claims.give_up_lost(job, error.as_dict())
    else:
        event: dict[str, Any] = {"lost_attempts": lost, "reason": reason}
        values = {"lost_attempts": lost}
        if next_rung is not None:
            event["memory_rung"] = values["memory_rung"] = next_rung
        claims.requeue_lost(job, ("requeued", event), **values)


def register_worker(
    database: Database,
    worker_id: str,
    queue: str,
    host: str,
    pid: int,
    job_id: str | None,
    capabilities: Capabilities = ANY,
) -> None:
    """Report a worker, what it has and what it works on; call it again to stay in the list."""
    with database.session(write=True) as session:
        WorkerRepository(session).report(
            worker_id, queue=queue, host=host, pid=pid, job_id=job_id, capabilities=capabilities
        )


def forget_worker(database: Database, worker_id: str) -> None:
    """Remove a worker that has shut down."""
    with database.session(write=True) as session:
        WorkerRepository(session).forget(worker_id)


def list_workers(session: Session) -> list[WorkerRead]:
    """Return the workers that have reported lately."""
    return [
        WorkerRead(
            id=worker.id,
            queue=worker.queue,
            host=worker.host,
            pid=worker.pid,
            job_id=worker.job_id,
            device=worker.device,
            memory_bytes=worker.memory_bytes,
            warm_base=worker.warm_base,
            absent_base_models=worker.absent_base_models,
            seconds_since_heartbeat=max(0.0, seconds),
        )
        for worker, seconds in WorkerRepository(session).list()
    ]

"""The order in which waiting jobs are taken, and what that order looks like to their owners.

The best job is found with one look into an index for each project, however many jobs wait or have
ended: the best of each project first, then the best of those. Only jobs that the asking worker
cannot run are stepped over one by one.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Select, case, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from core.capabilities import Capabilities
from core.db.models import Job, Project, utc_now

Stage = Literal["validate", "train"]

HELD_STATUS: Final = {"validate": "validating", "train": "running"}
WAITING_STATUS: Final = {"validate": "validating", "train": "queued"}

PATIENCE_SECONDS: Final = 300.0
"""A job that has waited for longer is not passed over for one whose base model is warm."""

MAX_COUNTED: Final = 1000
"""Jobs ahead are counted up to here, so that no look at a long queue takes long."""

# Jobs of a project among which one with the warm base model is looked for.
_WARM_WINDOW = 64
# More than workers there can be.
_MOST_HELD = 1_000_000
# Ended jobs that an estimate of the next one's duration looks at.
_HISTORY = 200

CLAIMED_AT: Final = {
    "validate": Project.last_validation_epoch,
    "train": Project.last_claim_epoch,
}


def best_waiting(
    stage: Stage, worker: Capabilities, default_running_quota: int, *, lock: bool = True
) -> Select[Any]:
    """Return a query for the id of the job that a worker should take, of any project.

    The highest priority first; then the project with the fewest jobs at work; then the one that
    has waited longest for a turn; within it a job with the worker's warm base model, unless that
    passes over one that has waited for `PATIENCE_SECONDS`; then the oldest.

    Args:
        stage: What the worker does.
        worker: What it has.
        default_running_quota: For projects without one of their own; 0 is no limit.
        lock: Take no job whose row is locked, and lock the one that is taken (Postgres).
    """
    held = _held_by_project(stage)
    running = func.coalesce(held.c.jobs, 0)
    best, candidate = aliased(Job), aliased(Job)
    of_project = (
        select(candidate.id)
        .where(candidate.project_id == Project.id, *_can_take(candidate, stage, worker))
        .order_by(candidate.queue_rank, candidate.id)
        .limit(1)
        .correlate(Project)
        .scalar_subquery()
    )
    query = (
        select(best.id, best.project_id, best.queue_rank)
        .select_from(Project)
        .outerjoin(held, held.c.project_id == Project.id)
        .join(best, best.id == of_project)
        .order_by(best.queue_rank, running, CLAIMED_AT[stage], best.id)
        .limit(1)
    )
    if stage == "train":
        quota = func.coalesce(Project.max_running_jobs, default_running_quota)
        query = query.where(or_(quota == 0, running < quota))
    if lock:
        # An owner who changes the best job at this moment holds nobody up.
        query = query.with_for_update(of=best, skip_locked=True)
    chosen = query.subquery("chosen")
    if worker.warm_base is None:
        return select(chosen.c.id)
    return select(_warm_or_oldest(chosen, stage, worker)).select_from(chosen)


def _warm_or_oldest(chosen: Any, stage: Stage, worker: Capabilities) -> Any:
    """Return the subquery for the job to take of the chosen one's project and priority."""
    waiting = aliased(Job)
    window = (
        select(waiting.id, waiting.base_model, waiting.created_at)
        .where(
            waiting.project_id == chosen.c.project_id,
            waiting.queue_rank == chosen.c.queue_rank,
            *_can_take(waiting, stage, worker),
        )
        .order_by(waiting.queue_rank, waiting.id)
        .limit(_WARM_WINDOW)
        .correlate(chosen)
        .subquery("window")
    )
    impatient_since = utc_now() - timedelta(seconds=PATIENCE_SECONDS)
    first = or_(window.c.base_model == worker.warm_base, window.c.created_at <= impatient_since)
    return (
        select(window.c.id)
        .order_by(case((first, 0), else_=1), window.c.id)
        .limit(1)
        .correlate(chosen)
        .scalar_subquery()
    )


def _can_take(job: type[Job], stage: Stage, worker: Capabilities) -> list[ColumnElement[bool]]:
    conditions = [job.status == WAITING_STATUS[stage], job.worker_id.is_(None)]
    if worker.absent_base_models:
        conditions.append(job.base_model.not_in(sorted(worker.absent_base_models)))
    if stage == "validate":
        return conditions
    if worker.device is not None:
        conditions.append(job.required_device.in_(("any", worker.device)))
    if worker.memory_bytes:
        on_cuda = worker.device == "cuda"
        needed = job.required_cuda_memory_bytes if on_cuda else job.required_memory_bytes
        conditions.append(needed <= worker.memory_bytes)
    return conditions


def _held_by_project(stage: Stage) -> Any:
    """Return how many jobs of each project are at work in a stage; few rows at any time."""
    # The limit has SQLite look the held jobs up before it groups them; else it reads all jobs in
    # the order of their projects.
    held = (
        select(Job.project_id, Job.status)
        .where(Job.worker_id.is_not(None))
        .limit(_MOST_HELD)
        .subquery("held_jobs")
    )
    return (
        select(held.c.project_id, func.count().label("jobs"))
        .where(held.c.status == HELD_STATUS[stage])
        .group_by(held.c.project_id)
        .subquery("held")
    )


class QueueRepository:
    """The queue as an owner sees it: what is ahead of a job, and how long it may take.

    Args:
        session: Where.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def count_ahead(self, job: Job) -> int:
        """Count the jobs, of any project, that wait before this one by priority and age.

        The count ends at `MAX_COUNTED`. Turns between projects can change the order.
        """
        ahead = (
            select(Job.id)
            .where(
                Job.status == job.status,
                tuple_(Job.queue_rank, Job.id) < (job.queue_rank, job.id),
                Job.worker_id.is_(None),
            )
            .limit(MAX_COUNTED)
            .subquery()
        )
        return self._session.scalar(select(func.count()).select_from(ahead)) or 0

    def running_etas(self) -> list[float | None]:
        """Return the seconds left of each job that is trained at present, where known."""
        query = select(Job.eta_seconds).where(Job.worker_id.is_not(None), Job.status == "running")
        return list(self._session.scalars(query.limit(MAX_COUNTED)))

    def mean_duration_seconds(self, project_id: str, base_model: str) -> float | None:
        """Return how long the project's jobs on a base model took lately; `None` without any."""
        recent = (
            select(Job.base_model, Job.used_seconds)
            .where(Job.project_id == project_id, Job.status == "succeeded", Job.dry_run.is_(False))
            .order_by(Job.id.desc())
            .limit(_HISTORY)
            .subquery()
        )
        return self._session.scalar(
            select(func.avg(recent.c.used_seconds)).where(
                recent.c.base_model == base_model, recent.c.used_seconds > 0
            )
        )

"""Jobs: cancel, pause, resume, retry, reorder, remove."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Body, status

from core import jobs
from core.queue import QueueName
from core.reads import JobRead
from service.auth import Trainer
from service.deps import CheckedBody, Services, ServicesDep, WriteSession
from service.openapi import problems
from service.schemas import JobChange

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post(
    "/{job_id}/cancel",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Cancel a job",
    responses=problems(401, 403, 404, 409),
)
def cancel_job(job_id: str, session: WriteSession, principal: Trainer) -> JobRead:
    """End a waiting or paused job at once; ask a running one to stop at its next step.

    `stop_requested` is `cancel` until the worker has stopped. A cancelled job keeps its
    checkpoints for a while and can be retried.
    """
    return jobs.cancel(session, principal, job_id)


@router.post(
    "/{job_id}/pause",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Pause a job",
    responses=problems(401, 403, 404, 409),
)
def pause_job(job_id: str, session: WriteSession, principal: Trainer) -> JobRead:
    """Pause a waiting job at once; have a running one saved at its next step and let go.

    `stop_requested` is `pause` until the worker has let go; then the job is `paused`, and no
    worker takes it before it is resumed.
    """
    return jobs.pause(session, principal, job_id)


@router.post(
    "/{job_id}/resume",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Resume a paused job",
    responses=problems(401, 403, 404, 409),
)
def resume_job(
    job_id: str,
    session: WriteSession,
    principal: Trainer,
    services: ServicesDep,
    background: BackgroundTasks,
) -> JobRead:
    """Let a paused job wait again; it goes on from its newest checkpoint.

    A pause that the worker has not got to yet is taken back, and the job runs on.
    """
    job = jobs.resume(session, principal, job_id)
    background.add_task(_wake, services, job)
    return job


@router.post(
    "/{job_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Retry a failed or cancelled job",
    responses=problems(401, 403, 404, 409, 429),
)
def retry_job(
    job_id: str,
    session: WriteSession,
    principal: Trainer,
    services: ServicesDep,
    background: BackgroundTasks,
) -> JobRead:
    """Start a job again that failed or was cancelled, with the same spec.

    It goes on from its newest usable checkpoint, or begins anew without one. Attempts and time
    are counted afresh.
    """
    job = jobs.retry(session, principal, job_id, settings=services.settings)
    background.add_task(_wake, services, job)
    return job


@router.patch(
    "/{job_id}",
    summary="Change a job's priority",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 404, 409, 422),
)
def change_job(
    job_id: str,
    change: Annotated[JobChange, Body()],
    session: WriteSession,
    principal: Trainer,
) -> JobRead:
    """Change the priority of an unfinished job; a running one is not interrupted for it."""
    return jobs.set_priority(session, principal, job_id, change.priority)


@router.delete(
    "/{job_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a finished job",
    responses=problems(401, 403, 404, 409),
)
def delete_job(job_id: str, session: WriteSession, principal: Trainer) -> None:
    """Remove an ended job with its events and metrics; what it published stays."""
    jobs.delete(session, principal, job_id)


def _wake(services: Services, job: JobRead) -> None:
    """Wake a worker for a job that waits; runs when the answer has left, hence after the commit."""
    queues: dict[str, QueueName] = {"queued": "train", "validating": "light"}
    if job.status in queues:
        services.queue.wake(queues[job.status])

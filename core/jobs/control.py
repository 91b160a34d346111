"""What the owner of a job does to it: cancel, pause, resume, retry, reorder, delete.

A job that no worker holds is moved at once. The worker of another one is asked, hears it with its
next heartbeat, and moves the job when it lets go of it.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from core import quotas
from core.config import Settings
from core.db.models import Job
from core.db.repositories import usage
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.dialect import is_key
from core.db.repositories.job_control import JobControl
from core.db.repositories.jobs import JobRepository
from core.errors import Conflict
from core.job_status import TERMINAL
from core.jobs import continuation
from core.jobs.sources import find_missing
from core.jobs.views import get
from core.principal import Principal
from core.reads import JobRead

# A worker that takes or lets go of the job at this very moment makes one more look necessary.
_LOOKS = 5


def cancel(session: Session, principal: Principal, job_id: str) -> JobRead:
    """Cancel a waiting or paused job at once; ask the worker of a running one to stop.

    Cancelling a cancelled job changes nothing.

    Args:
        session: Opened with `write=True`.
        principal: Who cancels.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_finished`; it has succeeded or failed.
    """
    jobs, control = JobRepository(session, principal), JobControl(session, principal)
    for _ in range(_LOOKS):
        job = jobs.get(job_id)
        if job.status == "cancelled" or job.stop_requested == "cancel":
            break
        if job.status in TERMINAL:
            raise _finished(job)
        if control.cancel_waiting(job_id) or control.request_cancel(job_id):
            break
    return get(session, principal, job_id)


def pause(session: Session, principal: Principal, job_id: str) -> JobRead:
    """Pause a waiting job at once; ask the worker of a running one to save it and let go.

    Pausing a paused job changes nothing.

    Args:
        session: Opened with `write=True`.
        principal: Who pauses.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_finished`, or `cancel_requested` when its worker is stopping it.
    """
    jobs, control = JobRepository(session, principal), JobControl(session, principal)
    for _ in range(_LOOKS):
        job = jobs.get(job_id)
        if job.status == "paused" or job.stop_requested == "pause":
            break
        if job.status in TERMINAL:
            raise _finished(job)
        if job.stop_requested == "cancel":
            raise Conflict(
                f"job {job_id} is being cancelled",
                code="cancel_requested",
                hint="Retry it once it is cancelled; it goes on from its checkpoint.",
            )
        if control.pause_waiting(job_id) or control.request_pause(job_id):
            break
    return get(session, principal, job_id)


def resume(session: Session, principal: Principal, job_id: str) -> JobRead:
    """Let a paused job wait again; it goes on from its newest checkpoint.

    A pause that its worker has not got to yet is taken back. The caller commits, and then wakes a
    worker of the queue that the job waits in.

    Args:
        session: Opened with `write=True`.
        principal: Who resumes.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_not_paused`.
    """
    jobs, control = JobRepository(session, principal), JobControl(session, principal)
    for _ in range(_LOOKS):
        job = jobs.get(job_id)
        if job.status != "paused" and job.stop_requested != "pause":
            raise Conflict(
                f"job {job_id} is {job.status} and not paused",
                code="job_not_paused",
                hint="A failed or cancelled job is started again with POST /jobs/{id}/retry."
                if job.status in ("failed", "cancelled")
                else None,
            )
        if control.unpause(job_id) or control.withdraw_pause(job_id):
            break
    return get(session, principal, job_id)


def retry(session: Session, principal: Principal, job_id: str, *, settings: Settings) -> JobRead:
    """Start a failed or cancelled job again; it goes on from its newest checkpoint.

    The caller commits, and then wakes a worker of the queue that the job waits in.

    Args:
        session: Opened with `write=True`.
        principal: Who retries.
        job_id: The job.
        settings: Limits; the job counts as a waiting one again.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: `job_finished` when it has succeeded, `job_not_finished`, or `input_missing`
            when its data set, its base model or the adapter it goes on from is gone.
        QuotaExceeded: Too many jobs wait.
    """
    job = JobRepository(session, principal).get(job_id)
    _check_ended(job)
    if (missing := find_missing(session, principal, job)) is not None:
        raise _input_missing(f"data set {missing}")
    if BaseModelRepository(session).find(job.base_model, keep=True) is None:
        raise _input_missing(f"base model {job.base_model!r}")
    if job.continue_digest and not continuation.is_there(session, principal, job.continue_digest):
        raise _input_missing("adapter to go on from")
    quotas.check_queue(session, principal, settings)
    ended_as = job.status
    retried = JobControl(session, principal).retry(job_id, ended_as)
    if retried is None:
        _check_ended(JobRepository(session, principal).get(job_id))
        raise Conflict(f"job {job_id} has changed meanwhile", code="job_changed")
    # Its seconds are counted anew; the tokens are those of the whole training.
    usage.take_back(session, retried, ended_as)
    return get(session, principal, job_id, settings=settings)


def set_priority(session: Session, principal: Principal, job_id: str, priority: int) -> JobRead:
    """Change the priority of an unfinished job.

    Args:
        session: Opened with `write=True`.
        principal: Who changes it.
        job_id: The job.
        priority: Higher runs first.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_finished`.
    """
    jobs = JobRepository(session, principal)
    job = jobs.get(job_id)
    if job.status in TERMINAL:
        raise _finished(job)
    if job.priority != priority:
        spec = {**job.spec, "priority": priority}
        if JobControl(session, principal).set_priority(job_id, priority, spec) is None:
            raise _finished(jobs.get(job_id))
    return get(session, principal, job_id)


def delete(session: Session, principal: Principal, job_id: str) -> None:
    """Remove an ended job with its history; what it published stays.

    Args:
        session: Opened with `write=True`.
        principal: Who deletes.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_not_finished`.
    """
    jobs = JobRepository(session, principal)
    if not (is_key(job_id) and jobs.delete(job_id)):
        raise _not_finished(jobs.get(job_id))


def _check_ended(job: Job) -> None:
    if job.status == "succeeded":
        raise _finished(job)
    if job.status not in TERMINAL:
        raise _not_finished(job)


def _finished(job: Job) -> Conflict:
    hint = "POST /jobs/{id}/retry starts it again." if job.status != "succeeded" else None
    return Conflict(f"job {job.id} has {_ended(job)} already", code="job_finished", hint=hint)


def _not_finished(job: Job) -> Conflict:
    return Conflict(
        f"job {job.id} is {job.status}", code="job_not_finished", hint="Cancel it first."
    )


def _input_missing(what: str) -> Conflict:
    return Conflict(
        f"the job's {what} is gone",
        code="input_missing",
        hint="Submit a new job with what is there.",
    )


def _ended(job: Job) -> str:
    return "been cancelled" if job.status == "cancelled" else job.status

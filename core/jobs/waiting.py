"""What a waiting job waits for: its place in the queue, how long it may take, and what is missing.

All of it is an estimate of what workers will do, made from what they do at present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from core import quotas
from core.config import Settings
from core.db.models import Job, Worker
from core.db.repositories.projects import ProjectRepository
from core.db.repositories.queue import QueueRepository
from core.db.repositories.workers import WorkerRepository

_GIB = 1024**3
_WORKER_SILENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Outlook:
    """What a waiting job can expect; see `core.reads.Progress` for the fields."""

    queue_position: int | None = None
    starts_in_seconds: float | None = None
    eta_seconds: float | None = None
    waiting_reason: str | None = None


def outlook(session: Session, job: Job, settings: Settings | None) -> Outlook:
    """Return what a job can expect; nothing when it does not wait.

    Args:
        session: Where.
        job: The job.
        settings: The default quota and how long a live worker may be silent.
    """
    if job.worker_id is not None or job.status not in ("validating", "queued"):
        return Outlook()
    queue = QueueRepository(session)
    position = queue.count_ahead(job)
    silence = settings.worker_silence_seconds if settings else _WORKER_SILENCE_SECONDS
    live = [worker for worker, seconds in WorkerRepository(session).list() if seconds <= silence]
    if job.status == "validating":
        workers = [worker for worker in live if worker.queue == "light"]
        return Outlook(queue_position=position, waiting_reason=_no_validator(job, workers))
    workers = [worker for worker in live if worker.queue == "train"]
    reason = _no_trainer(job, workers) or _quota(session, job, settings)
    if reason is not None:
        return Outlook(queue_position=position, waiting_reason=reason)
    mean = queue.mean_duration_seconds(job.project_id, job.base_model)
    if mean is None:
        return Outlook(queue_position=position)
    left = [mean if seconds is None else seconds for seconds in queue.running_etas()]
    starts_in = _starts_in_seconds(position, left, mean, len(workers))
    return Outlook(
        queue_position=position,
        starts_in_seconds=round(starts_in, 1),
        eta_seconds=round(starts_in + mean, 1),
    )


def _starts_in_seconds(position: int, left: Sequence[float], mean: float, workers: int) -> float:
    """Return the work ahead, shared by all workers; nothing when one of them is free."""
    if position < workers - len(left):
        return 0.0
    return (sum(left) + position * mean) / workers


def _no_validator(job: Job, workers: Sequence[Worker]) -> str | None:
    if not workers:
        return "no light worker is running, which would validate it"
    return _no_files(job, workers)


def _no_trainer(job: Job, workers: Sequence[Worker]) -> str | None:
    if not workers:
        return "no train worker is running"
    if job.required_device != "any":
        # A worker that has not told its device yet takes any job.
        workers = [worker for worker in workers if worker.device in (None, job.required_device)]
        if not workers:
            return f"no live worker has the device {job.required_device!r}"
    enough = [worker for worker in workers if _missing_bytes(job, worker) <= 0]
    if not enough:
        closest = min(workers, key=lambda worker: _missing_bytes(job, worker))
        needed = _missing_bytes(job, closest) + closest.memory_bytes
        return (
            f"it needs an estimated {needed / _GIB:.1f} GiB of memory and no live worker offers "
            f"more than {closest.memory_bytes / _GIB:.1f} GiB"
        )
    return _no_files(job, enough)


def _missing_bytes(job: Job, worker: Worker) -> int:
    if not worker.memory_bytes:
        return 0
    on_cuda = worker.device == "cuda"
    needed = job.required_cuda_memory_bytes if on_cuda else job.required_memory_bytes
    return needed - worker.memory_bytes


def _no_files(job: Job, workers: Sequence[Worker]) -> str | None:
    if all(job.base_model in worker.absent_base_models for worker in workers):
        return f"no live worker's machine has the files of the base model {job.base_model!r}"
    return None


def _quota(session: Session, job: Job, settings: Settings | None) -> str | None:
    if settings is None:
        return None
    projects = ProjectRepository(session)
    limit = quotas.limit_of(projects.find(job.project_id), settings, "running_jobs")
    running = projects.count_running_jobs(job.project_id) if limit else 0
    if limit and running >= limit:
        return f"the project has {running} jobs in training and may have {limit} at once"
    return None

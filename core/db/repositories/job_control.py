"""The statements by which a job's owner moves it: each checks the state that it changes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, or_
from sqlalchemy.orm import Session

from core.db.models import Job, utc_now
from core.db.repositories.history import Event, advance
from core.principal import Principal

_WAITS = or_(Job.status == "queued", and_(Job.status == "validating", Job.worker_id.is_(None)))


class JobControl:
    """Jobs of one project, moved by their owner.

    Every method returns the job after the change, or `None` when its state did not allow it.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
    """

    def __init__(self, session: Session, principal: Principal) -> None:
        self._session = session
        self._principal = principal

    def cancel_waiting(self, job_id: str) -> Job | None:
        """Cancel a job that no worker holds."""
        return self._move(
            job_id,
            or_(_WAITS, Job.status == "paused"),
            ("cancelled", {}),
            status="cancelled",
            finished_at=utc_now(),
        )

    def request_cancel(self, job_id: str) -> Job | None:
        """Ask the worker that holds the job to stop for good, unless it was asked."""
        return self._move(
            job_id,
            and_(
                Job.worker_id.is_not(None),
                or_(Job.stop_requested.is_(None), Job.stop_requested != "cancel"),
            ),
            ("cancel_requested", {}),
            stop_requested="cancel",
        )

    def pause_waiting(self, job_id: str) -> Job | None:
        """Pause a job that no worker holds."""
        return self._move(job_id, _WAITS, ("paused", {}), status="paused")

    def request_pause(self, job_id: str) -> Job | None:
        """Ask the worker that holds the job to hand it back, unless it was asked to stop it."""
        return self._move(
            job_id,
            and_(Job.worker_id.is_not(None), Job.stop_requested.is_(None)),
            ("pause_requested", {}),
            stop_requested="pause",
        )

    def unpause(self, job_id: str) -> Job | None:
        """Let a paused job wait where it has waited."""
        return self._wait_again(job_id, Job.status == "paused", ("unpaused", {}))

    def withdraw_pause(self, job_id: str) -> Job | None:
        """Take back what the worker was asked for and has not done yet."""
        return self._move(
            job_id,
            and_(Job.worker_id.is_not(None), Job.stop_requested == "pause"),
            ("pause_withdrawn", {}),
            stop_requested=None,
        )

    def retry(self, job_id: str, ended_as: str) -> Job | None:
        """Let a job that ended without success wait again, as if it had lost no attempt yet.

        Args:
            job_id: The job.
            ended_as: The status that it must be in.
        """
        return self._wait_again(
            job_id,
            Job.status == ended_as,
            ("retried", {}),
            error=None,
            finished_at=None,
            lost_attempts=0,
            used_seconds=0.0,
        )

    def set_priority(self, job_id: str, priority: int, spec: dict[str, Any]) -> Job | None:
        """Change the priority of an unfinished job, and the spec that names it."""
        return self._move(
            job_id,
            Job.status.in_(("validating", "queued", "running", "paused")),
            ("priority_changed", {"priority": priority}),
            priority=priority,
            queue_rank=-priority,
            spec=spec,
        )

    def _wait_again(
        self, job_id: str, condition: ColumnElement[bool], event: Event, **values: Any
    ) -> Job | None:
        for validated, status in ((True, "queued"), (False, "validating")):
            moved = self._move(
                job_id,
                and_(condition, Job.validated.is_(validated)),
                event,
                status=status,
                **values,
            )
            if moved is not None:
                return moved
        return None

    def _move(
        self, job_id: str, condition: ColumnElement[bool], event: Event, **values: Any
    ) -> Job | None:
        return advance(
            self._session,
            Job.id == job_id,
            Job.project_id == self._principal.project_id,
            Job.dry_run.is_(False),
            condition,
            events=[event],
            **values,
        )

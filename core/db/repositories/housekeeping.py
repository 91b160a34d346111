"""What has outlived its time, and which stored objects anybody still refers to.

Every removal is bounded, so that a transaction stays short, and finds its rows by an index, so that
it costs the same however many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Select,
    SQLColumnExpression,
    and_,
    delete,
    func,
    or_,
    select,
    tuple_,
)
from sqlalchemy.orm import DeclarativeBase, Session

from core.db.models import (
    AdapterVersion,
    Dataset,
    Export,
    IdempotencyKey,
    Job,
    JobCheckpoint,
    JobEvent,
    JobLog,
    JobMetric,
    WebhookDelivery,
)
from core.db.types import database_epoch
from core.job_status import TERMINAL, UNFINISHED

_DONE_DELIVERIES = ("delivered", "dead")


@dataclass(frozen=True)
class RemovedJobs:
    """What one batch removed.

    Attributes:
        jobs: How many jobs.
        checkpoints: SHA-256 and bytes of what they had stored; the bytes are the caller's business.
        more: Whether there may be more to remove.
    """

    jobs: int
    checkpoints: Sequence[tuple[str, int]]
    more: bool


class HousekeepingRepository:
    """Rows of all projects."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def referenced_blobs(self, names: Sequence[str]) -> set[str]:
        """Return those of some hashes that a data set, a checkpoint or an export has."""
        return {
            name
            for table in (Dataset, JobCheckpoint, Export)
            for name in self._session.scalars(
                select(table.sha256).where(table.sha256.in_(names)).distinct()
            )
            if name is not None
        }

    def referenced_adapters(self, names: Sequence[str]) -> set[str]:
        """Return those of some digests that a version has or an unfinished job goes on from."""
        versions = select(AdapterVersion.digest).where(AdapterVersion.digest.in_(names)).distinct()
        jobs = select(Job.continue_digest).where(
            Job.continue_digest.in_(names), Job.status.in_(UNFINISHED)
        )
        continued = {digest for digest in self._session.scalars(jobs) if digest is not None}
        return continued | set(self._session.scalars(versions))

    def list_done_with_checkpoints(
        self, ended_before: datetime, *, after: str, limit: int
    ) -> Sequence[str]:
        """Return jobs with checkpoints that no attempt will go on from, by id.

        Args:
            ended_before: Jobs that did not succeed keep theirs until then; those that did, do not.
            after: The id behind which to begin.
            limit: At most so many.
        """
        return self._session.scalars(
            _due_checkpoints(ended_before)
            .with_only_columns(JobCheckpoint.job_id)
            .where(JobCheckpoint.job_id > after)
            .distinct()
            .order_by(JobCheckpoint.job_id)
            .limit(limit)
        ).all()

    def remove_checkpoints(
        self, job_ids: Sequence[str], ended_before: datetime
    ) -> Sequence[JobCheckpoint]:
        """Delete the checkpoints of jobs that are still done with them; return what they were."""
        # With the job locked, nobody tries it again while its checkpoints go.
        due = self._session.scalars(
            _due_checkpoints(ended_before)
            .where(JobCheckpoint.job_id.in_(job_ids))
            .with_for_update(of=Job, skip_locked=True)
        ).all()
        if due:
            key = tuple_(JobCheckpoint.job_id, JobCheckpoint.step, JobCheckpoint.attempt)
            self._session.execute(
                delete(JobCheckpoint)
                .where(key.in_([(row.job_id, row.step, row.attempt) for row in due]))
                .execution_options(synchronize_session=False)
            )
        return due

    def count_checkpoints(self, ended_before: datetime) -> tuple[int, int]:
        """Return number and bytes of checkpoints that no attempt will go on from."""
        due = _due_checkpoints(ended_before).subquery()
        row = self._session.execute(
            select(func.count(), func.coalesce(func.sum(due.c.bytes), 0)).select_from(due)
        ).one()
        return row[0], int(row[1])

    def remove_jobs(self, ended_before: datetime, *, jobs: int, rows: int) -> RemovedJobs:
        """Delete jobs that ended before an instant, the longest ago first, with all they have.

        Args:
            ended_before: The instant.
            jobs: At most so many.
            rows: And at most so many events, measurements and pieces of log each; where there are
                more, those go first and the jobs with a later call.
        """
        ids = self._session.scalars(
            select(Job.id)
            .where(_due_jobs(ended_before))
            .order_by(Job.finished_at)
            .limit(jobs)
            .with_for_update(skip_locked=True)
        ).all()
        if not ids:
            return RemovedJobs(0, (), more=False)
        for table in (JobEvent, JobMetric, JobLog):
            keys = table.__mapper__.primary_key
            some = select(*keys).where(table.job_id.in_(ids)).order_by(*keys).limit(rows)
            if self._delete_some(table, keys, some) == rows:
                return RemovedJobs(0, (), more=True)
        checkpoints = self._session.execute(
            select(JobCheckpoint.sha256, JobCheckpoint.bytes).where(JobCheckpoint.job_id.in_(ids))
        ).all()
        self._session.execute(
            delete(Job).where(Job.id.in_(ids)).execution_options(synchronize_session=False)
        )
        return RemovedJobs(len(ids), [(row[0], row[1]) for row in checkpoints], more=True)

    def remove_dry_runs(self, ended_before: datetime, limit: int) -> int:
        """Delete dry runs that ended before an instant, with their few events; return how many."""
        due = (
            select(Job.id)
            .where(Job.dry_run.is_(True), Job.finished_at < ended_before)
            .order_by(Job.finished_at)
            .limit(limit)
        )
        return self._delete_some(Job, (Job.id,), due)

    def count_jobs(self, ended_before: datetime) -> int:
        """Return how many jobs `remove_jobs` would delete in the end."""
        return self._count(Job, _due_jobs(ended_before))

    def remove_deliveries(self, seconds: float, limit: int) -> int:
        """Delete messages to webhooks that are done since `seconds`; return how many."""
        due = select(WebhookDelivery.id).where(self._due_deliveries(seconds)).limit(limit)
        return self._delete_some(WebhookDelivery, (WebhookDelivery.id,), due)

    def count_deliveries(self, seconds: float) -> int:
        """Return how many messages `remove_deliveries` would delete in the end."""
        return self._count(WebhookDelivery, self._due_deliveries(seconds))

    def remove_idempotency_keys(self, used_before: datetime, limit: int) -> int:
        """Delete idempotency keys used before an instant; return how many."""
        keys = (IdempotencyKey.project_id, IdempotencyKey.key)
        due = select(*keys).where(IdempotencyKey.created_at < used_before).limit(limit)
        return self._delete_some(IdempotencyKey, keys, due)

    def count_idempotency_keys(self, used_before: datetime) -> int:
        """Return how many keys `remove_idempotency_keys` would delete in the end."""
        return self._count(IdempotencyKey, IdempotencyKey.created_at < used_before)

    def _due_deliveries(self, seconds: float) -> ColumnElement[bool]:
        # Asked for beforehand: next to a clock a planner cannot guess how few these are.
        now = self._session.scalars(select(database_epoch())).one()
        # When it was last tried: the time of the next attempt is set with each, and stays then.
        return and_(
            WebhookDelivery.status.in_(_DONE_DELIVERIES),
            WebhookDelivery.next_attempt_epoch < now - seconds,
        )

    def _delete_some(
        self,
        table: type[DeclarativeBase],
        keys: Sequence[SQLColumnExpression[Any]],
        chosen: Select[*tuple[Any, ...]],
    ) -> int:
        key = keys[0] if len(keys) == 1 else tuple_(*keys)
        deleted = self._session.execute(
            delete(table).where(key.in_(chosen)).execution_options(synchronize_session=False)
        )
        return cast("CursorResult[Any]", deleted).rowcount

    def _count(self, table: type[DeclarativeBase], condition: ColumnElement[bool]) -> int:
        return self._session.scalar(select(func.count()).select_from(table).where(condition)) or 0


def _due_checkpoints(ended_before: datetime) -> Select[JobCheckpoint]:
    given_up = and_(Job.status.in_(("failed", "cancelled")), Job.finished_at < ended_before)
    return (
        select(JobCheckpoint)
        .join(Job, Job.id == JobCheckpoint.job_id)
        .where(or_(Job.status == "succeeded", given_up))
    )


def _due_jobs(ended_before: datetime) -> ColumnElement[bool]:
    return and_(Job.finished_at < ended_before, Job.status.in_(TERMINAL), Job.dry_run.is_(False))

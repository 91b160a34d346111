"""Sums and look-ups for operators, over all projects where nothing of a project shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import Adapter, AdapterVersion, Job, UsageTotal, WebhookDelivery, Worker
from core.db.types import database_epoch
from core.job_status import UNFINISHED
from core.principal import Principal

_OPEN_DELIVERIES = ("pending", "dead")


@dataclass(frozen=True)
class Totals:
    """What all projects together look like, read without counting a table that grows.

    Attributes:
        unfinished: Status → jobs; statuses that no job has are 0.
        oldest: Status → when the oldest of these jobs was submitted.
        ended: Status → how often a job ended so, ever.
        trained_tokens: Of ended jobs, the removed ones included, and of running ones.
        used_seconds: Of work on ended jobs, the removed ones included.
        expired_leases: Jobs whose worker has fallen silent and that the sweep has yet to find.
        deliveries: Of webhooks, not delivered: status → number.
        delivery_delay_seconds: For how long the oldest pending delivery has been due.
        workers: Queue → workers that reported lately.
    """

    unfinished: Mapping[str, int]
    oldest: Mapping[str, datetime]
    ended: Mapping[str, int]
    trained_tokens: int
    used_seconds: float
    expired_leases: int
    deliveries: Mapping[str, int]
    delivery_delay_seconds: float
    workers: Mapping[str, int]


def read_totals(session: Session, *, worker_silence_seconds: float) -> Totals:
    """Read what operators watch.

    Args:
        session: Where.
        worker_silence_seconds: A worker that has not reported for so long is not counted.
    """
    ended = session.execute(
        select(
            UsageTotal.status,
            func.sum(UsageTotal.jobs),
            func.sum(UsageTotal.trained_tokens),
            func.sum(UsageTotal.used_seconds),
        ).group_by(UsageTotal.status)
    ).all()
    running_tokens = session.scalar(
        select(func.coalesce(func.sum(Job.trained_tokens), 0)).where(Job.status == "running")
    )
    expired = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(Job.worker_id.is_not(None), Job.lease_expires_epoch < database_epoch())
    )
    delay = session.scalar(
        select(database_epoch() - func.min(WebhookDelivery.next_attempt_epoch)).where(
            WebhookDelivery.status == "pending"
        )
    )
    workers = session.execute(
        select(Worker.queue, func.count())
        .where(Worker.heartbeat_epoch >= database_epoch() - worker_silence_seconds)
        .group_by(Worker.queue)
    )
    # By group, so that no planner looks for the smallest id along the primary key.
    unfinished = session.execute(
        select(Job.status, func.count(), func.min(Job.id))
        .where(Job.status.in_(UNFINISHED), Job.dry_run.is_(False))
        .group_by(Job.status)
    ).all()
    deliveries = session.execute(
        select(WebhookDelivery.status, func.count())
        .where(WebhookDelivery.status.in_(_OPEN_DELIVERIES))
        .group_by(WebhookDelivery.status)
    )
    return Totals(
        unfinished=dict.fromkeys(UNFINISHED, 0) | {row[0]: row[1] for row in unfinished},
        oldest=_created(session, {row[0]: row[2] for row in unfinished}),
        ended={row[0]: int(row[1]) for row in ended},
        trained_tokens=sum(int(row[2]) for row in ended) + int(running_tokens or 0),
        used_seconds=sum(float(row[3]) for row in ended),
        expired_leases=expired or 0,
        deliveries=dict.fromkeys(_OPEN_DELIVERIES, 0) | {row[0]: row[1] for row in deliveries},
        delivery_delay_seconds=max(0.0, delay or 0.0),
        workers={row[0]: row[1] for row in workers},
    )


def _created(session: Session, first_ids: Mapping[str, str]) -> dict[str, datetime]:
    """Return status → when the job of that id was submitted; ids sort by that time."""
    created = session.execute(select(Job.id, Job.created_at).where(Job.id.in_(first_ids.values())))
    times = {row[0]: row[1] for row in created}
    return {status: times[job_id] for status, job_id in first_ids.items() if job_id in times}


def owned_jobs(session: Session, principal: Principal, job_ids: Collection[str]) -> set[str]:
    """Return which of these jobs belong to the principal's project."""
    query = select(Job.id).where(
        Job.project_id == principal.project_id, Job.id.in_(job_ids), Job.dry_run.is_(False)
    )
    return set(session.scalars(query)) if job_ids else set()


def names_by_digest(
    session: Session, principal: Principal, digests: Collection[str]
) -> Mapping[str, list[str]]:
    """Return digest → `NAME@VERSION` of the principal's project, digests without any left out."""
    found: dict[str, list[str]] = {}
    if digests:
        rows = session.execute(
            select(AdapterVersion.digest, Adapter.name, AdapterVersion.version)
            .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
            .where(
                AdapterVersion.project_id == principal.project_id,
                AdapterVersion.digest.in_(digests),
            )
            .order_by(Adapter.name, AdapterVersion.version)
        )
        for digest, name, version in rows:
            found.setdefault(digest, []).append(f"{name}@{version}")
    return found

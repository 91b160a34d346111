"""Sums and look-ups for operators, over all projects where nothing of a project shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import Adapter, AdapterVersion, Job
from core.principal import Principal


def count_jobs(session: Session) -> dict[str, int]:
    """Return status → number of jobs, of all projects."""
    rows = session.execute(select(Job.status, func.count()).group_by(Job.status))
    return {row[0]: row[1] for row in rows}


def sum_trained_tokens(session: Session) -> int:
    """Return the tokens on which the loss of all jobs was computed."""
    return int(session.scalar(select(func.coalesce(func.sum(Job.trained_tokens), 0))) or 0)


def owned_jobs(session: Session, principal: Principal, job_ids: Collection[str]) -> set[str]:
    """Return which of these jobs belong to the principal's project."""
    query = select(Job.id).where(Job.project_id == principal.project_id, Job.id.in_(job_ids))
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

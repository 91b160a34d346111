"""Usage totals: what ended jobs add up to, kept so that no read has to count a growing table.

`jobs` counts ends: a job that is tried again ends, and counts, once more. Its tokens are taken back
when it goes on, since the next end brings those of the whole training; its seconds begin anew.
Removing a job changes no total, for the work was done.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.db.models import Job, UsageTotal
from core.db.repositories.dialect import insert_into
from core.principal import Principal

_SUMS = ("jobs", "trained_tokens", "used_seconds")


def count_end(session: Session, job: Job) -> None:
    """Add a job that has just ended to the totals of its project."""
    statement = insert_into(session, UsageTotal).values(
        project_id=job.project_id,
        status=job.status,
        jobs=1,
        trained_tokens=job.trained_tokens,
        used_seconds=job.used_seconds,
    )
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["project_id", "status"],
            set_={name: getattr(UsageTotal, name) + statement.excluded[name] for name in _SUMS},
        )
    )


def take_back(session: Session, job: Job, ended_as: str) -> None:
    """Take what a job that goes on brings again out of the totals of what has ended.

    Args:
        session: In whose transaction the job left its end.
        job: With the tokens and seconds that it goes on from.
        ended_as: The status that it left.
    """
    session.execute(
        update(UsageTotal)
        .where(UsageTotal.project_id == job.project_id, UsageTotal.status == ended_as)
        .values(
            trained_tokens=UsageTotal.trained_tokens - job.trained_tokens,
            used_seconds=UsageTotal.used_seconds - job.used_seconds,
        )
        .execution_options(synchronize_session=False)
    )


def list_totals(session: Session, principal: Principal) -> Sequence[UsageTotal]:
    """Return the totals of a project, one row for each status that one of its jobs ended in."""
    return session.scalars(
        select(UsageTotal)
        .where(UsageTotal.project_id == principal.project_id)
        .order_by(UsageTotal.status)
        .execution_options(populate_existing=True)
    ).all()

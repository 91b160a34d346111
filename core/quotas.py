"""Quotas: how much a project may have waiting, at work and stored.

The settings hold the defaults; a project's own values go before them. 0 is no limit. The number of
running jobs is not refused but waited for: the claim passes over a project that has as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from sqlalchemy.orm import Session

from core.config import Settings
from core.db.models import Project
from core.db.repositories import usage as totals
from core.db.repositories.projects import ProjectRepository
from core.errors import InvalidInput, QuotaExceeded
from core.principal import Principal
from core.reads import ProjectRead, QuotaRead, UsageRead

QuotaName = Literal["queued_jobs", "running_jobs", "stored_rows", "stored_bytes"]
QUOTA_NAMES: Final[tuple[QuotaName, ...]] = get_args(QuotaName)

# Farther from its limit than this a project's submissions do not wait for each other.
_NEAR_LIMIT = 100
_RETRY_AFTER_SECONDS = 30
_LARGEST: Final[Mapping[QuotaName, int]] = {
    "queued_jobs": 2**31 - 1,
    "running_jobs": 2**31 - 1,
    "stored_rows": 2**63 - 1,
    "stored_bytes": 2**63 - 1,
}


def limit_of(project: Project | None, settings: Settings, name: QuotaName) -> int:
    """Return what a quota allows a project; 0 is no limit."""
    own: int | None = getattr(project, f"max_{name}", None)
    default: int = getattr(settings, f"quota_{name}")
    return default if own is None else own


def check_queue(session: Session, principal: Principal, settings: Settings) -> None:
    """Refuse one more waiting job if the project has as many as it may.

    What is added in the same transaction cannot exceed the quota, even if others add at the same
    time.

    Args:
        session: Opened with `write=True`.
        principal: Whose project.
        settings: The defaults.

    Raises:
        QuotaExceeded: Of `queued_jobs`; worth a retry.
    """
    projects = ProjectRepository(session)
    limit = limit_of(projects.find(principal.project_id), settings, "queued_jobs")
    if not limit:
        return
    used = projects.count_waiting_jobs(principal.project_id)
    if used + _NEAR_LIMIT >= limit:
        projects.find(principal.project_id, lock=True)
        used = projects.count_waiting_jobs(principal.project_id)
    if used >= limit:
        raise QuotaExceeded(
            f"the project has {used} jobs waiting and may have {limit}",
            limit="queued_jobs",
            value=limit,
            used=used,
            retry_after_seconds=_RETRY_AFTER_SECONDS,
            hint="Retry when some have started, cancel some, or ask the operator for more.",
        )


def check_unfinished(
    used: int, limit: int, *, what: str, retry_after_seconds: int = _RETRY_AFTER_SECONDS
) -> None:
    """Refuse one more of what a project may have a fixed number of at a time.

    Args:
        used: How many have not ended.
        limit: Of them.
        what: Their name, in the plural; also that of the limit.
        retry_after_seconds: When some will have ended.

    Raises:
        QuotaExceeded: Worth a retry.
    """
    if used >= limit:
        raise QuotaExceeded(
            f"the project has {used} {what} going on and may have {limit}",
            limit=what,
            value=limit,
            used=used,
            retry_after_seconds=retry_after_seconds,
            hint="Retry when some have ended.",
        )


def check_storage(
    session: Session,
    principal: Principal,
    settings: Settings,
    *,
    rows: int,
    bytes: int,  # noqa: A002 (named as the column it fills)
) -> None:
    """Refuse to store more rows or bytes than the project may have.

    Args:
        session: Opened with `write=True`.
        principal: Whose project.
        settings: The defaults.
        rows: That are about to be added in the same transaction.
        bytes: Likewise.

    Raises:
        QuotaExceeded: Of `stored_rows` or `stored_bytes`; somebody has to delete something.
    """
    projects = ProjectRepository(session)
    project = projects.find(principal.project_id)
    limits = {
        "stored_rows": limit_of(project, settings, "stored_rows"),
        "stored_bytes": limit_of(project, settings, "stored_bytes"),
    }
    if not any(limits.values()):
        return
    projects.find(principal.project_id, lock=True)
    used = dict(zip(limits, projects.sum_stored(principal.project_id), strict=True))
    for name, added in (("stored_rows", rows), ("stored_bytes", bytes)):
        if added and limits[name] and used[name] + added > limits[name]:
            unit = name.removeprefix("stored_")
            raise QuotaExceeded(
                f"with {added} {unit} more the project would store {used[name] + added} {unit}; "
                f"it may store {limits[name]}",
                limit=name,
                value=limits[name],
                used=used[name],
                hint="Delete data sets, exports or adapter versions, or ask the operator for more.",
            )


def usage(session: Session, principal: Principal, settings: Settings) -> UsageRead:
    """Return what a project has used and what its quotas allow."""
    projects = ProjectRepository(session)
    project = projects.find(principal.project_id)
    ended = totals.list_totals(session, principal)
    rows, stored_bytes = projects.sum_stored(principal.project_id)
    used = {
        "queued_jobs": projects.count_waiting_jobs(principal.project_id),
        "running_jobs": projects.count_running_jobs(principal.project_id),
        "stored_rows": rows,
        "stored_bytes": stored_bytes,
    }
    return UsageRead(
        ended_jobs={row.status: row.jobs for row in ended},
        trained_tokens=sum(row.trained_tokens for row in ended),
        used_seconds=sum(row.used_seconds for row in ended),
        quotas={
            name: QuotaRead(limit=limit_of(project, settings, name) or None, used=used[name])
            for name in QUOTA_NAMES
        },
    )


def list_projects(session: Session, settings: Settings) -> list[ProjectRead]:
    """Return all projects with what their quotas allow, by name."""
    return [_to_read(project, settings) for project in ProjectRepository(session).list()]


def set_quotas(
    session: Session, settings: Settings, name: str, values: Mapping[QuotaName, int | None]
) -> ProjectRead:
    """Give a project quotas of its own.

    Args:
        session: Opened with `write=True`.
        settings: The defaults.
        name: The project's.
        values: Quotas to change; 0 is no limit, `None` the service's default.

    Raises:
        NotFound: Code `unknown_project`.
        InvalidInput: Code `invalid_quota`.
    """
    project = ProjectRepository(session).get_by_name(name)
    for quota, value in values.items():
        if value is not None and not 0 <= value <= _LARGEST[quota]:
            raise InvalidInput(
                f"{value} is no quota for {quota}", code="invalid_quota", field=quota
            )
        setattr(project, f"max_{quota}", value)
    session.flush()
    return _to_read(project, settings)


def _to_read(project: Project, settings: Settings) -> ProjectRead:
    return ProjectRead(
        name=project.name,
        quotas={name: limit_of(project, settings, name) or None for name in QUOTA_NAMES},
        own=[name for name in QUOTA_NAMES if getattr(project, f"max_{name}") is not None],
        created_at=project.created_at,
    )

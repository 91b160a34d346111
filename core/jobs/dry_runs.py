"""Dry runs of specs: the validation of a job that will not be trained.

One is a job with a mark. It takes the same way through claim, lease and sweep, so that the death of
a worker costs it a moment; it ends with its report where a job would wait for training. No list,
total, quota or webhook knows of it, and it is removed after a day.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from sqlalchemy.orm import Session

from core import quotas
from core.config import Settings
from core.data.report import DryRunReport
from core.db.models import Job
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.claims import ClaimRepository
from core.db.repositories.dry_runs import DryRunRepository
from core.db.session import Database
from core.ids import new_id
from core.jobs import requirements
from core.jobs.continuation import find_first_weights
from core.jobs.estimates import estimate_training
from core.jobs.leases import Claim, storable, validated
from core.jobs.servable import check_servable
from core.jobs.sources import find_sources, keep_sources
from core.jobs.submission import find_base_model
from core.jobs.trackers import check_trackers
from core.principal import Principal
from core.reads import DryRunRead
from core.specs import JobSpec

# Somebody waits for the answer: before any job, whose priority is 100 at most.
_QUEUE_RANK = -101
_MOST_UNFINISHED = 20
_RETRY_AFTER_SECONDS = 5


def start_dry_run(
    database: Database, principal: Principal, spec: JobSpec, *, settings: Settings
) -> DryRunRead:
    """Store a dry run after the checks of a submission; the caller wakes a light worker.

    Inline rows stay with it and become no data set; what is wrong in them is for the report.

    Args:
        database: Where.
        principal: Who asks.
        spec: What would be trained.
        settings: How long a live worker may be silent.

    Raises:
        InvalidInput: `unknown_base_model`, `unknown_dataset`, `unknown_target_module` or
            `rank_not_servable`.
        QuotaExceeded: Too many dry runs of the project have not ended.
    """
    with database.session(write=True) as session:
        dry_runs = DryRunRepository(session, principal)
        quotas.check_unfinished(
            dry_runs.count_unfinished(),
            _MOST_UNFINISHED,
            what="validations",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
        check_trackers(spec, settings)
        check_servable(spec, settings)
        base = find_base_model(session, spec.base_model)
        needed = requirements.estimate(spec, base.description)
        find_first_weights(session, principal, spec, base)
        sources = find_sources(session, principal, spec, settings)
        job = Job(
            id=new_id("validation"),
            project_id=principal.project_id,
            dataset_id=sources[0].dataset_id or "",
            base_model=spec.base_model,
            adapter_name=spec.adapter or "",
            spec=spec.model_dump(mode="json"),
            queue_rank=_QUEUE_RANK,
            status="validating",
            dry_run=True,
            required_device=needed.device,
            required_memory_bytes=needed.memory_bytes,
            required_cuda_memory_bytes=needed.cuda_memory_bytes,
        )
        dry_runs.add(job)
        keep_sources(session, job, sources)
        return _to_read(job)


def get_dry_run(session: Session, principal: Principal, dry_run_id: str) -> DryRunRead:
    """Return a dry run, with its report once it has one.

    Raises:
        NotFound: Code `unknown_validation`.
    """
    return _to_read(DryRunRepository(session, principal).get(dry_run_id))


def validation_done(
    database: Database, claim: Claim, worker_id: str, report: dict[str, Any], **fetched: Any
) -> None:
    """Pass a job on to training, or end a dry run, to whose report the estimate is added.

    Args:
        database: Where.
        claim: The attempt.
        worker_id: Who holds it.
        report: Of the dry run.
        fetched: What `validated` takes of rows that were fetched; a dry run does not keep them.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    if not claim.dry_run:
        validated(database, claim, worker_id, report, **fetched)
        return
    examined = DryRunReport.model_validate(report)
    with database.session() as session:
        base = BaseModelRepository(session).find(claim.spec.base_model)
        estimate = estimate_training(session, claim.spec, examined, base)
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).end(
            claim.job_id,
            claim.attempt,
            claim.stage,
            "succeeded",
            ("validated", {"valid": examined.valid}),
            report=storable({"report": report, "estimate": estimate.model_dump(mode="json")}),
            # Inline rows have served.
            spec=without_rows(claim.spec),
        )


def without_rows(spec: JobSpec) -> dict[str, Any]:
    """Return a spec as JSON, with a name in place of inline rows."""
    if spec.rows is not None:
        spec = spec.model_copy(update={"rows": None, "dataset": "inline"})
    return spec.model_dump(mode="json")


def _to_read(job: Job) -> DryRunRead:
    found = job.report or {}
    report = found.get("report")
    return DryRunRead(
        id=job.id,
        status=cast("Literal['validating', 'succeeded', 'failed']", job.status),
        valid=report["valid"] if report else None,
        report=report,
        estimate=found.get("estimate"),
        error=job.error,
        created_at=job.created_at,
        finished_at=job.finished_at,
    )

"""Dry runs of specs: the validation of a job that will not be trained.

One is a job with a mark. It takes the same way through claim, lease and sweep, so that the death of
a worker costs it a moment; it ends with its report where a job would wait for training. No list,
total, quota or webhook knows of it, and it is removed after a day.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any, Literal, cast

from sqlalchemy.orm import Session

from core.config import Settings
from core.data.report import DryRunReport
from core.db.models import Job
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.claims import ClaimRepository
from core.db.repositories.dry_runs import DryRunRepository, list_trained
from core.db.repositories.workers import WorkerRepository
from core.db.session import Database
from core.errors import QuotaExceeded
from core.ids import new_id
from core.jobs import requirements
from core.jobs.leases import Claim, storable, validated
from core.jobs.submission import find_base_model, find_dataset
from core.principal import Principal
from core.reads import DryRunRead, Estimate
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
        InvalidInput: `unknown_base_model`, `unknown_dataset` or `unknown_target_module`.
        QuotaExceeded: Too many dry runs of the project have not ended.
    """
    with database.session(write=True) as session:
        dry_runs = DryRunRepository(session, principal)
        used = dry_runs.count_unfinished()
        if used >= _MOST_UNFINISHED:
            raise QuotaExceeded(
                f"the project has {used} validations going on and may have {_MOST_UNFINISHED}",
                limit="validations",
                value=_MOST_UNFINISHED,
                used=used,
                retry_after_seconds=_RETRY_AFTER_SECONDS,
                hint="Retry when some have ended.",
            )
        base = find_base_model(session, spec.base_model)
        needed = requirements.estimate(spec, base.description)
        dataset_id = find_dataset(session, principal, spec.dataset).id if spec.dataset else ""
        job = Job(
            id=new_id("validation"),
            project_id=principal.project_id,
            dataset_id=dataset_id,
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
        return _to_read(job)


def get_dry_run(session: Session, principal: Principal, dry_run_id: str) -> DryRunRead:
    """Return a dry run, with its report once it has one.

    Raises:
        NotFound: Code `unknown_validation`.
    """
    return _to_read(DryRunRepository(session, principal).get(dry_run_id))


def validation_done(
    database: Database, claim: Claim, worker_id: str, report: dict[str, Any]
) -> None:
    """Pass a job on to training, or end a dry run, to whose report the estimate is added.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    if not claim.dry_run:
        validated(database, claim, worker_id, report)
        return
    examined = DryRunReport.model_validate(report)
    with database.session() as session:
        base = BaseModelRepository(session).find(claim.spec.base_model)
        estimate = estimate_training(
            session, claim.project_id, claim.spec, examined, base.description if base else {}
        )
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


def estimate_training(
    session: Session,
    project_id: str,
    spec: JobSpec,
    report: DryRunReport,
    description: Mapping[str, Any],
) -> Estimate:
    """Return how long training may take and what memory it may need.

    The seconds are those of the project's last jobs on the base model and device: the tokens by
    the mean speed of training, and on top the mean time that they needed for all else. The memory
    is that of one forward and backward pass over a batch of the longest rows, from the same
    estimate that decides which worker may take the job.

    Args:
        session: Where.
        project_id: Whose jobs are looked at.
        spec: What would be trained.
        report: Of the dry run.
        description: What inspection found of the base model.
    """
    trained = list_trained(session, project_id, spec.base_model)
    device: str | None = spec.resources.device
    if device == "any":
        known = [worker.device for worker, _ in WorkerRepository(session).list() if worker.device]
        known += [job.device for job in trained]
        device = known[0] if known else None
    if report.tokens is None:
        reason = "no row is without error"
        return Estimate(device=device, seconds_reason=reason, memory_reason=reason)
    if device is None:
        reason = "no train worker has told which device it has"
        return Estimate(seconds_reason=reason, memory_reason=reason)
    memory_bytes = requirements.memory_bytes(
        spec,
        description,
        on_cuda=device == "cuda",
        tokens=spec.training.batch_size * report.tokens.max,
    )
    measured = [job for job in trained if job.device == device]
    if not measured:
        return Estimate(
            device=device,
            seconds_reason=f"no job of the project on {spec.base_model!r} has succeeded on "
            f"{device!r} lately",
            peak_memory_bytes=memory_bytes,
        )
    speed = fmean(job.tokens_per_second for job in measured)
    beside = fmean(
        max(0.0, job.used_seconds - job.tokens / job.tokens_per_second) for job in measured
    )
    return Estimate(
        device=device,
        seconds=round(report.total_tokens / speed + beside, 1),
        tokens_per_second=round(speed, 1),
        measured_jobs=len(measured),
        peak_memory_bytes=memory_bytes,
    )


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

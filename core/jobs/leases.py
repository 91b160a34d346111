"""What a worker does with a job: claim it, keep the lease, report, and end it.

A claim names an attempt. Every later write matches job, attempt, worker and status in the statement
that writes, so a worker that was taken for dead changes nothing when it comes back (fencing).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from core import failpoints, registry
from core.artifacts import Manifest
from core.base_models import to_ref
from core.capabilities import ANY, Capabilities
from core.config import Settings
from core.db.models import Job, utc_now
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.claims import ClaimRepository
from core.db.repositories.history import Event, HistoryRepository
from core.db.repositories.queue import Stage
from core.db.session import Database
from core.errors import TunesmithError
from core.inference.engine import BaseModelRef
from core.jobs import logs
from core.jobs.checkpoints import CheckpointRef, usable_checkpoints
from core.jobs.sources import FetchedRows, SourceRef, open_sources, register_fetched
from core.jobs.updates import EventUpdate, MetricUpdate, ProgressUpdate, Update
from core.principal import Principal
from core.specs import JobSpec
from core.storage import ArtifactStore

# While owners are changing the jobs that a worker would take.
_MAX_TRIES = 20
_TRY_AGAIN_SECONDS = 0.02


@dataclass(frozen=True)
class Claim:
    """One attempt at one stage of a job, and what the work needs.

    Attributes:
        stage: `validate` is the dry run, `train` the training.
        sources: The data sets.
        continue_digest: Of the adapter whose weights training begins with.
        dry_run: The job ends with its validation; see `core.jobs.dry_runs`.
        stop_requested: What the owner has asked for already: `cancel` or `pause`.
        memory_rung: Where on the memory ladder this attempt begins.
        used_seconds: How long earlier attempts have worked.
        checkpoints: To go on from, the newest first.
    """

    job_id: str
    attempt: int
    project_id: str
    stage: Stage
    spec: JobSpec
    base: BaseModelRef
    sources: tuple[SourceRef, ...]
    adapter_name: str
    continue_digest: str | None = None
    dry_run: bool = False
    stop_requested: str | None = None
    memory_rung: int = 0
    used_seconds: float = 0.0
    checkpoints: tuple[CheckpointRef, ...] = ()


def claim(
    database: Database,
    *,
    worker_id: str,
    stage: Stage,
    lease_seconds: float,
    worker: Capabilities = ANY,
    running_quota: int = 0,
) -> Claim | None:
    """Take the best waiting job for a stage, by priority, turn between projects, and age.

    Args:
        database: Where.
        worker_id: Who takes it.
        stage: What the worker does with it.
        lease_seconds: How long the first lease lasts.
        worker: What the worker has; it gets no job that needs more.
        running_quota: How many jobs a project may have in training that has no quota of its own;
            0 is no limit.

    Returns:
        `None` when nothing waits that the worker can run.
    """
    tries = 0
    while True:
        with database.session(write=True) as session:
            claims = ClaimRepository(session, worker_id)
            job = claims.claim(stage, lease_seconds, worker, running_quota)
            if job is None:
                tries += 1
                if tries > _MAX_TRIES or not claims.is_waiting(stage, worker, running_quota):
                    return None
            else:
                opened = _open(session, job, stage)
                if isinstance(opened, Claim):
                    return opened
                # It cannot be worked on at all; fail it instead of meeting it again for ever.
                claims.end(job.id, job.attempt, stage, "failed", _failure(opened), error=opened)
        if job is None:
            # Its owner was changing it; that takes a moment.
            time.sleep(_TRY_AGAIN_SECONDS)


def heartbeat(database: Database, claim: Claim, worker_id: str, lease_seconds: float) -> str | None:
    """Extend the lease and return what the owner asks for: `cancel`, `pause` or nothing.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    with database.session(write=True) as session:
        claims = ClaimRepository(session, worker_id)
        return claims.renew(claim.job_id, claim.attempt, claim.stage, lease_seconds).stop_requested


def record(
    database: Database,
    claim: Claim,
    worker_id: str,
    updates: Sequence[Update],
    *,
    output: str = "",
    max_log_bytes: int = 0,
    lease_seconds: float | None = None,
) -> str | None:
    """Store events, measurements, progress and log lines in one transaction.

    Args:
        database: Where.
        claim: The attempt that reports.
        worker_id: Who holds it.
        updates: What it reports.
        output: Lines for the job's log; see `core.jobs.logs`.
        max_log_bytes: What is kept of the log.
        lease_seconds: Extend the lease as well, for which no second transaction is needed.

    Returns:
        What the owner asks for, as from `heartbeat`.

    Raises:
        LeaseLost: The worker holds that attempt no longer; nothing was stored.
    """
    events: list[Event] = []
    progress: dict[str, Any] = {}
    measured: dict[int, MetricUpdate] = {}
    for update in updates:
        match update:
            case EventUpdate():
                events.append((update.type, storable(update.data)))
            case ProgressUpdate():
                progress |= _given(update)
            case MetricUpdate():
                earlier = measured.get(update.step, update)
                measured[update.step] = replace(earlier, **_given(update))
    with database.session(write=True) as session:
        claims = ClaimRepository(session, worker_id)
        held = (claim.job_id, claim.attempt, claim.stage)
        if lease_seconds is None:
            job = claims.write(*held, events, **progress)
        else:
            job = claims.renew(*held, lease_seconds, events, **progress)
        created_at = utc_now()
        HistoryRepository(session).merge_metrics(
            [
                {"job_id": claim.job_id, "attempt": claim.attempt, "created_at": created_at}
                | storable(asdict(metric))
                for metric in measured.values()
            ]
        )
        if output and max_log_bytes:
            logs.append(session, claim.job_id, claim.attempt, output, max_log_bytes)
        if updates:
            failpoints.reached("events.flush", job_id=claim.job_id, attempt=claim.attempt)
        return job.stop_requested


def validated(
    database: Database,
    claim: Claim,
    worker_id: str,
    report: dict[str, Any],
    *,
    fetched: Sequence[FetchedRows] = (),
    settings: Settings | None = None,
    store: ArtifactStore | None = None,
) -> None:
    """Pass a job whose dry run found no fault on to training; it waits as `queued`.

    Args:
        database: Where.
        claim: The attempt that validated it.
        worker_id: Who holds the attempt.
        report: Of the dry run.
        fetched: Rows that become data sets of the project, for which the others are needed.
        settings: The quotas.
        store: Holds the rows.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
        QuotaExceeded: The project would store too much.
    """
    with database.session(write=True) as session:
        claims = ClaimRepository(session, worker_id)
        values: dict[str, Any] = {}
        if fetched:
            assert settings is not None
            assert store is not None
            claims.write(claim.job_id, claim.attempt, claim.stage)
            owner = Principal(project_id=claim.project_id, scopes=frozenset())
            first = register_fetched(
                session, owner, claim.job_id, fetched, settings=settings, store=store
            )
            values = {"dataset_id": first} if first else {}
        claims.hand_back(
            claim.job_id,
            claim.attempt,
            claim.stage,
            "queued",
            ("validated", storable(report)),
            validated=True,
            **values,
        )


def release(database: Database, claim: Claim, worker_id: str) -> None:
    """Give a job back unfinished, as a worker does that shuts down or that was asked to pause it.

    It waits again, or is paused or cancelled if its owner wants that.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    status = "queued" if claim.stage == "train" else "validating"
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).hand_back(
            claim.job_id, claim.attempt, claim.stage, status, ("released", {})
        )


def fail(database: Database, claim: Claim, worker_id: str, error: dict[str, Any]) -> None:
    """End a job with an error as `core.errors.to_wire` or `as_dict` encodes it.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    shown = storable({name: value for name, value in error.items() if name != "kind"})
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).end(
            claim.job_id, claim.attempt, claim.stage, "failed", _failure(shown), error=shown
        )


def cancelled(database: Database, claim: Claim, worker_id: str) -> None:
    """End a job as cancelled, once its work has stopped.

    Raises:
        LeaseLost: The worker holds that attempt no longer.
    """
    with database.session(write=True) as session:
        ClaimRepository(session, worker_id).end(
            claim.job_id, claim.attempt, claim.stage, "cancelled", ("cancelled", {})
        )


def succeed(
    database: Database,
    claim: Claim,
    worker_id: str,
    *,
    manifest: Manifest,
    bytes: int,  # noqa: A002 (named as the column it fills)
    report: dict[str, Any],
    provenance: dict[str, Any],
    store: ArtifactStore,
) -> None:
    """Publish what a job trained: version, alias `latest` and success in one transaction.

    Whether the alias moves is the spec's `promote` to say; see `core.registry.promotion`.

    Args:
        database: Where.
        claim: The attempt that trained it.
        worker_id: Who holds the attempt.
        manifest: Of the artifact, which the store holds already.
        bytes: Size of the artifact's files.
        report: The before/after report.
        provenance: How it came about; not part of the digest.
        store: Holds the artifact; publishing is refused if it was deleted meanwhile.

    Raises:
        LeaseLost: The worker holds that attempt no longer; nothing was published.
        Unavailable: Code `artifact_gone`; store it and call again.
    """
    with database.session(write=True) as session:
        claims = ClaimRepository(session, worker_id)
        claims.write(claim.job_id, claim.attempt, claim.stage)
        promotion = registry.decide(claim.spec.promote, report)
        version = registry.publish(
            session,
            project_id=claim.project_id,
            name=claim.adapter_name,
            base_model=claim.base.name,
            manifest=manifest,
            bytes=bytes,
            origin="job",
            job_id=claim.job_id,
            provenance=storable(provenance),
            store=store,
            promotion=promotion,
        )
        published = {
            "adapter": claim.adapter_name,
            "version": version.version,
            "digest": version.digest,
            "promoted": promotion.promoted,
        }
        if promotion.quarantine is not None:
            kept_back = {**published, "reason": promotion.quarantine}
            claims.write(claim.job_id, claim.attempt, claim.stage, [("quarantined", kept_back)])
        claims.end(
            claim.job_id,
            claim.attempt,
            claim.stage,
            "succeeded",
            ("succeeded", published),
            version_id=version.id,
            report=storable(report),
        )
        failpoints.reached("publish.commit", job_id=claim.job_id, attempt=claim.attempt)
    failpoints.reached("publish.committed", job_id=claim.job_id, attempt=claim.attempt)


def _open(session: Session, job: Job, stage: Stage) -> Claim | dict[str, Any]:
    sources = open_sources(session, job)
    base = BaseModelRepository(session).find(job.base_model)
    if sources is None or base is None:
        missing = "data set" if sources is None else "base model"
        error = TunesmithError(f"the job's {missing} is gone", code="input_missing")
        return error.as_dict()
    try:
        spec = JobSpec.model_validate(job.spec)
    except ValidationError as error:
        return TunesmithError(f"the stored spec is invalid: {error}", code="invalid_spec").as_dict()
    return Claim(
        job_id=job.id,
        attempt=job.attempt,
        project_id=job.project_id,
        stage=stage,
        spec=spec,
        base=to_ref(base),
        sources=sources,
        adapter_name=job.adapter_name,
        continue_digest=job.continue_digest,
        dry_run=job.dry_run,
        stop_requested=job.stop_requested,
        memory_rung=job.memory_rung,
        used_seconds=job.used_seconds,
        checkpoints=usable_checkpoints(session, job) if stage == "train" else (),
    )


def _failure(error: dict[str, Any]) -> Event:
    return "failed", {"error": error}


def _given(update: MetricUpdate | ProgressUpdate) -> dict[str, Any]:
    return {name: value for name, value in asdict(update).items() if value is not None}


def storable(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` as a database takes JSON: NaN and infinities, which JSON has not, are null."""
    plain: dict[str, Any] = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return plain

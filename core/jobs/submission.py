"""How a job comes into being: its spec is checked against what there is, then stored."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from sqlalchemy.orm import Session

from core import datasets, quotas
from core.config import Settings
from core.data.check import DatasetReport, check_rows
from core.db.models import BaseModel, Dataset, IdempotencyKey, Job
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.datasets import DatasetRepository
from core.db.repositories.history import advance
from core.db.repositories.jobs import JobRepository
from core.db.session import Database
from core.errors import Conflict, InvalidInput, QuotaExceeded, TunesmithError
from core.ids import new_id
from core.jobs import requirements
from core.jobs.continuation import find_first_weights
from core.jobs.servable import check_servable
from core.jobs.sources import find_sources, keep_sources
from core.jobs.trackers import check_trackers
from core.jobs.views import get
from core.principal import Principal
from core.reads import JobRead
from core.specs import JobSpec
from core.storage import ArtifactStore, Blob

_MAX_ADAPTER_NAME = 63
_JOB_SUFFIX = 8
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True)
class StoredRows:
    """Inline rows of a spec: checked, and their bytes stored."""

    blob: Blob
    report: DatasetReport


def accept(
    database: Database,
    principal: Principal,
    spec: JobSpec,
    *,
    settings: Settings,
    idempotency_key: str | None = None,
    store: ArtifactStore,
) -> tuple[JobRead, bool]:
    """Submit a job in a transaction of its own; inline rows of a refused one are not kept.

    The caller wakes a worker if the job is new. See `submit` for arguments, result and errors.
    """
    _check_key(idempotency_key)
    inline = store_rows(spec, settings, store)
    try:
        with database.session(write=True) as session:
            return submit(
                session,
                principal,
                spec,
                settings=settings,
                idempotency_key=idempotency_key,
                store=store,
                inline=inline,
            )
    except TunesmithError:
        if inline is not None:
            # Unless a data set has the same rows.
            datasets.discard_blob(database, store, inline.blob.sha256)
        raise


def store_rows(spec: JobSpec, settings: Settings, store: ArtifactStore) -> StoredRows | None:
    """Check and store the inline rows of a spec; `None` when it names a data set.

    Raises:
        InvalidInput: Code `invalid_dataset`, with the rows that are wrong.
    """
    if spec.rows is None:
        return None
    report = check_rows(spec.rows, spec.data.columns)
    report.raise_for_errors()
    lines = ((json.dumps(row) + "\n").encode("ascii") for row in spec.rows)
    return StoredRows(store.write_blob(lines, settings.max_upload_bytes), report)


def submit(
    session: Session,
    principal: Principal,
    spec: JobSpec,
    *,
    settings: Settings,
    idempotency_key: str | None = None,
    store: ArtifactStore,
    inline: StoredRows | None = None,
) -> tuple[JobRead, bool]:
    """Create a job, or find the one that the idempotency key created.

    The caller commits, and then wakes a worker.

    Args:
        session: Opened with `write=True` and not used yet: inline rows are stored first, so that
            no transaction waits for the disk.
        principal: Who submits.
        spec: What to train.
        settings: Limits.
        idempotency_key: The same key with the same spec gives the same job.
        store: Where inline rows go.
        inline: From `store_rows`, which is called here otherwise.

    Returns:
        The job and whether it is new.

    Raises:
        InvalidInput: `unknown_base_model`, `unknown_dataset`, `unknown_target_module`,
            `rank_not_servable`, `invalid_dataset` or `unknown_column` (inline rows),
            `invalid_idempotency_key`, or what `find_first_weights` raises.
        Forbidden: `hub_datasets_disabled` or `hub_dataset_not_allowed`.
        Conflict: `idempotency_key_reused`; the key came with another spec before.
        QuotaExceeded: Too many jobs wait, or too much would be stored.
    """
    _check_key(idempotency_key)
    inline = inline or store_rows(spec, settings, store)
    body_sha256 = _fingerprint(spec)
    jobs = JobRepository(session, principal)

    def known_job() -> JobRead | None:
        if idempotency_key is None:
            return None
        known = jobs.find_key(idempotency_key)
        return _same_job(session, principal, known, body_sha256) if known else None

    if (same := known_job()) is not None:
        return same, False
    check_trackers(spec, settings)
    check_servable(spec, settings)
    base = find_base_model(session, spec.base_model)
    needed = requirements.estimate(spec, base.description)
    first = find_first_weights(session, principal, spec, base)
    try:
        quotas.check_queue(session, principal, settings)
    except QuotaExceeded:
        # Perhaps because of the job of this very key, from a request at the same time.
        if (same := known_job()) is not None:
            return same, False
        raise
    dataset = None
    if inline is not None:
        dataset = _add_inline(session, principal, settings, store, inline)
    sources = find_sources(
        session, principal, spec, settings, inline_id=dataset.id if dataset else None
    )
    job = _new_job(principal, spec, sources[0].dataset_id or "", needed)
    if first is not None:
        first.set_on(job)
    if idempotency_key is None:
        jobs.add(job)
    else:
        key = IdempotencyKey(
            project_id=principal.project_id,
            key=idempotency_key,
            body_sha256=body_sha256,
            job_id=job.id,
        )
        if not jobs.add_under_key(job, key):
            # Another request with this key was first; an inline data set of ours is superfluous.
            if dataset is not None:
                DatasetRepository(session, principal).delete(dataset)
            if (same := known_job()) is None:
                raise Conflict("the job of this Idempotency-Key was just deleted; send it again")
            return same, False
    keep_sources(session, job, sources)
    created = {
        "adapter": job.adapter_name,
        "base_model": job.base_model,
        "dataset": job.dataset_id or sources[0].reference,
    }
    advance(session, Job.id == job.id, events=[("created", created)])
    return get(session, principal, job.id, settings=settings), True


def _check_key(idempotency_key: str | None) -> None:
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidInput(
            "Idempotency-Key must have 1 to 255 printable ASCII characters",
            code="invalid_idempotency_key",
            field="Idempotency-Key",
        )


def _add_inline(
    session: Session,
    principal: Principal,
    settings: Settings,
    store: ArtifactStore,
    inline: StoredRows,
) -> Dataset:
    report, blob = inline.report, inline.blob
    quotas.check_storage(session, principal, settings, rows=report.rows, bytes=blob.bytes)
    return datasets.add_row(
        session,
        principal,
        store,
        filename="inline.jsonl",
        blob=blob,
        format=report.format,
        rows=report.rows,
        report=report.model_dump(mode="json"),
    )


def _new_job(
    principal: Principal, spec: JobSpec, dataset_id: str, needed: requirements.Requirements
) -> Job:
    job_id = new_id("job")
    name = spec.adapter or _default_adapter_name(spec.base_model, job_id)
    stored = spec.model_copy(update={"adapter": name})
    if spec.rows is not None:
        stored = stored.model_copy(update={"rows": None, "dataset": dataset_id})
    return Job(
        id=job_id,
        project_id=principal.project_id,
        dataset_id=dataset_id,
        base_model=spec.base_model,
        adapter_name=name,
        spec=stored.model_dump(mode="json"),
        priority=spec.priority,
        queue_rank=-spec.priority,
        status="validating",
        required_device=needed.device,
        required_memory_bytes=needed.memory_bytes,
        required_cuda_memory_bytes=needed.cuda_memory_bytes,
    )


def _default_adapter_name(base_model: str, job_id: str) -> str:
    stem = base_model[: _MAX_ADAPTER_NAME - _JOB_SUFFIX - 1]
    return f"{stem}-{job_id[-_JOB_SUFFIX:]}"


def find_base_model(session: Session, name: str) -> BaseModel:
    """Return the base model of a spec, kept until the transaction ends.

    Raises:
        InvalidInput: Code `unknown_base_model`.
    """
    models = BaseModelRepository(session)
    model = models.find(name, keep=True)
    if model is None:
        names = [known.name for known in models.list()]
        raise InvalidInput(
            f"there is no base model {name!r}",
            code="unknown_base_model",
            field="base_model",
            hint=f"Use one of: {', '.join(names)}."
            if names
            else "The operator adds one with `tunesmith models add`.",
        )
    return model


def _fingerprint(spec: JobSpec) -> str:
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _same_job(
    session: Session, principal: Principal, key: IdempotencyKey, body_sha256: str
) -> JobRead:
    if key.body_sha256 != body_sha256:
        raise Conflict(
            "this Idempotency-Key came with another request before",
            code="idempotency_key_reused",
            field="Idempotency-Key",
            hint="Use a new key for a new job.",
        )
    return get(session, principal, key.job_id)

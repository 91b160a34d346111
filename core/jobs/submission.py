"""What the owner of a job does to it: submit, cancel, delete."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from sqlalchemy.orm import Session

from core import datasets
from core.config import Settings
from core.data.check import DatasetReport, check_rows
from core.db.models import BaseModel, Dataset, IdempotencyKey, Job
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.datasets import DatasetRepository
from core.db.repositories.history import advance
from core.db.repositories.jobs import JobRepository
from core.errors import Conflict, InvalidInput
from core.ids import new_id
from core.jobs.views import get
from core.principal import Principal
from core.reads import JobRead
from core.specs import JobSpec, LoraSpec
from core.storage import ArtifactStore, Blob

_MAX_ADAPTER_NAME = 63
_JOB_SUFFIX = 8
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")


def submit(
    session: Session,
    principal: Principal,
    spec: JobSpec,
    *,
    settings: Settings,
    idempotency_key: str | None = None,
    store: ArtifactStore,
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

    Returns:
        The job and whether it is new.

    Raises:
        InvalidInput: `unknown_base_model`, `unknown_dataset`, `unknown_target_module`,
            `invalid_dataset` (inline rows) or `invalid_idempotency_key`.
        Conflict: `idempotency_key_reused`; the key came with another spec before.
    """
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidInput(
            "Idempotency-Key must have 1 to 255 printable ASCII characters",
            code="invalid_idempotency_key",
            field="Idempotency-Key",
        )
    inline = _store_rows(spec.rows, settings, store) if spec.rows is not None else None
    body_sha256 = _fingerprint(spec)
    jobs = JobRepository(session, principal)
    if idempotency_key is not None:
        known = jobs.find_key(idempotency_key)
        if known is not None:
            return _same_job(session, principal, known, body_sha256), False

    base = _base_model(session, spec.base_model)
    _check_target_modules(spec.lora, base.description["linear_modules"])
    if inline is not None:
        dataset = datasets.add_row(session, principal, store, filename="inline.jsonl", **inline)
    else:
        dataset = _dataset(session, principal, spec.dataset or "")
    job = _new_job(principal, spec, dataset)
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
            if inline is not None:
                DatasetRepository(session, principal).delete(dataset)
            winner = jobs.find_key(idempotency_key)
            if winner is None:
                raise Conflict("the job of this Idempotency-Key was just deleted; send it again")
            return _same_job(session, principal, winner, body_sha256), False
    created = {"adapter": job.adapter_name, "base_model": job.base_model, "dataset": dataset.id}
    advance(session, Job.id == job.id, events=[("created", created)])
    return get(session, principal, job.id), True


def cancel(session: Session, principal: Principal, job_id: str) -> JobRead:
    """Cancel a waiting job at once; ask the worker of a running one to stop.

    Cancelling a cancelled job changes nothing.

    Args:
        session: Opened with `write=True`.
        principal: Who cancels.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_finished`; it has succeeded or failed.
    """
    jobs = JobRepository(session, principal)
    if jobs.cancel_waiting(job_id) is None and jobs.request_cancel(job_id) is None:
        job = jobs.get(job_id)
        if job.status in ("succeeded", "failed"):
            raise Conflict(f"job {job_id} has {job.status} already", code="job_finished")
    return get(session, principal, job_id)


def delete(session: Session, principal: Principal, job_id: str) -> None:
    """Remove an ended job with its history; what it published stays.

    Args:
        session: Opened with `write=True`.
        principal: Who deletes.
        job_id: The job.

    Raises:
        NotFound: Code `unknown_job`.
        Conflict: Code `job_not_finished`.
    """
    jobs = JobRepository(session, principal)
    if jobs.delete(job_id):
        return
    job = jobs.get(job_id)
    raise Conflict(
        f"job {job_id} is {job.status}", code="job_not_finished", hint="Cancel it first."
    )


def _new_job(principal: Principal, spec: JobSpec, dataset: Dataset) -> Job:
    job_id = new_id("job")
    name = spec.adapter or _default_adapter_name(spec.base_model, job_id)
    stored = spec.model_copy(update={"rows": None, "dataset": dataset.id, "adapter": name})
    return Job(
        id=job_id,
        project_id=principal.project_id,
        dataset_id=dataset.id,
        base_model=spec.base_model,
        adapter_name=name,
        spec=stored.model_dump(mode="json"),
        priority=spec.priority,
        queue_rank=-spec.priority,
        status="validating",
    )


def _default_adapter_name(base_model: str, job_id: str) -> str:
    stem = base_model[: _MAX_ADAPTER_NAME - _JOB_SUFFIX - 1]
    return f"{stem}-{job_id[-_JOB_SUFFIX:]}"


def _store_rows(
    rows: list[dict[str, Any]], settings: Settings, store: ArtifactStore
) -> dict[str, Any]:
    report: DatasetReport = check_rows(rows)
    report.raise_for_errors()
    lines = ((json.dumps(row) + "\n").encode("ascii") for row in rows)
    blob: Blob = store.write_blob(lines, settings.max_upload_bytes)
    return {
        "blob": blob,
        "format": report.format,
        "rows": report.rows,
        "report": report.model_dump(mode="json"),
    }


def _base_model(session: Session, name: str) -> BaseModel:
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


def _dataset(session: Session, principal: Principal, dataset_id: str) -> Dataset:
    dataset = DatasetRepository(session, principal).find(dataset_id, keep=True)
    if dataset is None:
        raise InvalidInput(
            f"there is no data set {dataset_id!r}",
            code="unknown_dataset",
            field="dataset",
            hint="Upload one with POST /datasets and use the id it answers with.",
        )
    return dataset


def _check_target_modules(lora: LoraSpec, linear_modules: Iterable[str]) -> None:
    if lora.target_modules == "all-linear":
        return
    names = list(linear_modules)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in lora.target_modules:
        # PEFT's rule for a list: the whole name, or its end at a dot.
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        close = difflib.get_close_matches(target, endings, n=1)
        offer = f"Did you mean {close[0]!r}? " if close else ""
        raise InvalidInput(
            f"the base model has no linear module {target!r}",
            code="unknown_target_module",
            field="lora.target_modules",
            hint=f"{offer}Its modules: {', '.join(endings)}.",
        )


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

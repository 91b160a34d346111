"""The data sets of a job: what its spec names, what the database keeps, what a worker gets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.orm import Session

from core import datasets, quotas
from core.config import Settings
from core.data.detect import FORMATS, DatasetFormat
from core.data.sources import SourceRole
from core.db.models import Job, JobSource
from core.db.repositories.datasets import DatasetRepository, find_by_id
from core.db.repositories.job_sources import add_sources, list_sources, set_fetched
from core.errors import Forbidden, InvalidInput
from core.principal import Principal
from core.specs import HUB_PREFIX, JobSpec, parse_hub_reference
from core.storage import ArtifactStore, Blob

INLINE = "inline"
_DEFAULT_SPLITS: Mapping[str, str] = {"training": "train", "validation": "validation"}


@dataclass(frozen=True)
class SourceRef:
    """One data set of a claimed job.

    Attributes:
        position: In the job.
        reference: As the spec has it; `inline` for rows that a dry run carries itself.
        sha256: Of its bytes; empty while there are none.
        format: Of its rows; `None` when it is not known.
        split: Of a data set of the Hugging Face Hub.
    """

    position: int
    reference: str
    role: SourceRole = "training"
    weight: float = 1.0
    sha256: str = ""
    format: DatasetFormat | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """What findings call it."""
        return f"{self.reference} {self.split}" if self.split else self.reference


@dataclass(frozen=True)
class FetchedRows:
    """Rows of a source that a worker has fetched and stored.

    Attributes:
        position: Of the source.
        blob: Their bytes.
        report: Of `core.data.check`.
    """

    position: int
    blob: Blob
    report: Mapping[str, Any]


def find_sources(
    session: Session,
    principal: Principal,
    spec: JobSpec,
    settings: Settings,
    *,
    inline_id: str | None = None,
) -> list[JobSource]:
    """Return the data sets that a spec names, in order; nobody deletes them until the commit.

    Args:
        session: Opened with `write=True`.
        principal: Whose data sets are looked at.
        spec: The job.
        settings: Which data sets of the Hugging Face Hub may be fetched.
        inline_id: The data set that inline rows have become.

    Raises:
        InvalidInput: Code `unknown_dataset`.
        Forbidden: Code `hub_datasets_disabled` or `hub_dataset_not_allowed`.
    """
    found = []
    for position, (field, source) in enumerate(_named(spec, inline_id)):
        source.position = position
        if source.reference.startswith(HUB_PREFIX):
            check_hub_reference(settings, source.reference, field)
            source.split = source.split or _DEFAULT_SPLITS[source.role]
        elif source.dataset_id is None and source.reference != INLINE:
            source.dataset_id = find_dataset_id(session, principal, source.reference, field)
        found.append(source)
    return found


def keep_sources(session: Session, job: Job, sources: Sequence[JobSource]) -> None:
    """Store the sources of a new job, unless the job itself names its only one."""
    if len(sources) == 1 and not sources[0].reference.startswith(HUB_PREFIX):
        return
    for source in sources:
        source.job_id = job.id
    add_sources(session, sources)


def open_sources(session: Session, job: Job) -> tuple[SourceRef, ...] | None:
    """Return the data sets of a job; `None` when one of them is gone."""
    kept: Sequence[JobSource] = list_sources(session, job.id)
    if not kept:
        kept = [
            JobSource(
                position=0,
                role="training",
                reference=job.dataset_id or INLINE,
                dataset_id=job.dataset_id or None,
                weight=1.0,
            )
        ]
    opened = []
    for source in kept:
        dataset = find_by_id(session, source.dataset_id) if source.dataset_id else None
        if dataset is None and source.dataset_id:
            return None
        known = dataset is not None and dataset.format in FORMATS
        opened.append(
            SourceRef(
                position=source.position,
                reference=source.reference,
                role=cast("SourceRole", source.role),
                weight=source.weight,
                sha256=dataset.sha256 if dataset else "",
                format=cast("DatasetFormat", dataset.format) if dataset and known else None,
                split=source.split,
            )
        )
    return tuple(opened)


def first_reference(job: Job) -> str:
    """Return what the spec of a job calls its first data set."""
    several = job.spec.get("datasets")
    reference = several[0]["dataset"] if several else job.spec.get("dataset")
    return str(reference or "")


def find_missing(session: Session, principal: Principal, job: Job) -> str | None:
    """Return the id of a data set of a job that is gone; the others stay until the commit."""
    ids = [source.dataset_id for source in list_sources(session, job.id)] or [job.dataset_id]
    repository = DatasetRepository(session, principal)
    for dataset_id in ids:
        if dataset_id and repository.find(dataset_id, keep=True) is None:
            return dataset_id
    return None


def register_fetched(
    session: Session,
    principal: Principal,
    job_id: str,
    fetched: Sequence[FetchedRows],
    *,
    settings: Settings,
    store: ArtifactStore,
) -> str | None:
    """Make data sets of what a worker fetched for a job; return the id of the job's first.

    Args:
        session: Opened with `write=True`.
        principal: The job's project.
        job_id: The job.
        fetched: The rows, whose bytes the store holds.
        settings: The quotas.
        store: Holds the bytes.

    Raises:
        QuotaExceeded: The project would store too much.
        Unavailable: Code `blob_gone`.
    """
    first = None
    references = {source.position: source for source in list_sources(session, job_id)}
    for rows in fetched:
        source = references[rows.position]
        count = int(rows.report["rows"])
        quotas.check_storage(session, principal, settings, rows=count, bytes=rows.blob.bytes)
        dataset = datasets.add_row(
            session,
            principal,
            store,
            filename=f"{source.reference} {source.split}".replace("/", ":"),
            blob=rows.blob,
            format=rows.report["format"],
            rows=count,
            report=dict(rows.report),
        )
        set_fetched(session, job_id, rows.position, dataset.id)
        if rows.position == 0:
            first = dataset.id
    return first


def check_hub_reference(settings: Settings, reference: str, field: str | None = None) -> None:
    """Refuse a data set of the Hugging Face Hub that the operator has not allowed.

    Raises:
        Forbidden: Code `hub_datasets_disabled` or `hub_dataset_not_allowed`.
    """
    allowed = [part.strip() for part in settings.hub_datasets.split(",") if part.strip()]
    if not allowed:
        raise Forbidden(
            "data sets of the Hugging Face Hub are not fetched here",
            code="hub_datasets_disabled",
            field=field,
            hint="Upload the rows, or ask the operator to set TUNESMITH_HUB_DATASETS.",
        )
    repository = parse_hub_reference(reference).repository
    if not any(fnmatch.fnmatchcase(repository, pattern) for pattern in allowed):
        raise Forbidden(
            f"{repository} is none of the data sets that are fetched here",
            code="hub_dataset_not_allowed",
            field=field,
            hint=f"Allowed: {', '.join(allowed)}.",
        )


def find_dataset_id(session: Session, principal: Principal, dataset_id: str, field: str) -> str:
    """Return the id of a data set that exists, kept until the transaction ends.

    Raises:
        InvalidInput: Code `unknown_dataset`.
    """
    if DatasetRepository(session, principal).find(dataset_id, keep=True) is None:
        raise InvalidInput(
            f"there is no data set {dataset_id!r}",
            code="unknown_dataset",
            field=field,
            hint="Upload one with POST /datasets and use the id it answers with.",
        )
    return dataset_id


def _named(spec: JobSpec, inline_id: str | None) -> Iterator[tuple[str, JobSource]]:
    """Yield the spec's data sets with the fields that name them, those to learn from first."""
    if spec.rows is not None:
        inline = JobSource(role="training", reference=inline_id or INLINE, weight=1.0)
        inline.dataset_id = inline_id
        yield "rows", inline
    elif spec.dataset is not None:
        yield (
            "dataset",
            JobSource(role="training", reference=spec.dataset, split=spec.split, weight=1.0),
        )
    for index, named in enumerate(spec.datasets or []):
        source = JobSource(
            role="training", reference=named.dataset, split=named.split, weight=named.weight
        )
        yield f"datasets.{index}.dataset", source
    if spec.data.validation_dataset is not None:
        source = JobSource(
            role="validation",
            reference=spec.data.validation_dataset,
            split=spec.data.validation_split,
            weight=1.0,
        )
        yield "data.validation_dataset", source

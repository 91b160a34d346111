"""The verdict: what must be true once every job has ended, read from database and store."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
from sqlalchemy import select
from sqlalchemy.orm import Session

from core.artifacts import Manifest, verify_files
from core.base_models import to_ref
from core.config import Settings
from core.db.models import (
    Adapter,
    AdapterAlias,
    AdapterVersion,
    BaseModel,
    Dataset,
    IdempotencyKey,
    Job,
    JobCheckpoint,
    JobEvent,
    JobMetric,
)
from core.db.session import Database
from core.errors import TunesmithError
from core.housekeeping import clean
from core.job_status import TERMINAL
from core.storage import ArtifactStore, open_store
from tests.chaos.load import Accepted
from tests.chaos.reference import train_undisturbed
from tests.support.cluster import Cluster
from tests.support.polling import wait_until

_GENERATE_SECONDS = 60.0
_WORK_SECONDS = 15.0
# Longer than the housekeeping leaves what an interrupted writer left behind.
_LONG_AGO_SECONDS = 7200.0


@dataclass
class Evidence:
    """What the run leaves behind.

    Attributes:
        cluster: Still running, nothing disturbs it any more.
        settings: Those of its processes.
        database: Its database.
        accepted: The jobs that clients were promised.
        retried: Jobs that failed for a full disk and were tried again: how often.
        directory: For the undisturbed training.
    """

    cluster: Cluster
    settings: Settings
    database: Database
    accepted: Sequence[Accepted]
    retried: Mapping[str, int]
    directory: Path


RowCheck = Callable[[Evidence, Session, ArtifactStore], Iterator[str]]
Check = Callable[[Evidence, ArtifactStore], Iterator[str]]


def judge(evidence: Evidence, say: Callable[[str], None]) -> tuple[dict[str, int], list[str]]:
    """Return how many jobs ended in which state, and all violations; stops the cluster."""
    violations: list[str] = []
    store = open_store(evidence.settings)
    with evidence.database.session() as session:
        counts = Counter(session.scalars(select(Job.status)))

    def on_rows(check: RowCheck) -> Check:
        @functools.wraps(check)
        def with_session(evidence: Evidence, store: ArtifactStore) -> Iterator[str]:
            with evidence.database.session() as session:
                yield from list(check(evidence, session, store))

        return with_session

    for check in (
        *(on_rows(check) for check in ROW_CHECKS),
        _answers,
        _work,
        _weights,
        _processes,
        store_has_what_is_referenced,
    ):
        began = time.monotonic()
        try:
            found = list(check(evidence, store))
        except Exception as error:
            found = [f"{check.__name__} could not be judged: {error!r}"]
        violations += found
        title = (check.__doc__ or "").splitlines()[0]
        took = time.monotonic() - began
        say(f"{'FAIL' if found else 'ok':>8}  {title} ({took:.1f} s)")
    return dict(counts), violations


def jobs_ended_once(evidence: Evidence, session: Session, _: ArtifactStore) -> Iterator[str]:
    """Each accepted job is there once and has succeeded."""
    jobs = {job.id: job for job in session.scalars(select(Job))}
    keys = {row.key: row.job_id for row in session.scalars(select(IdempotencyKey))}
    accepted = {entry.key: entry.job_id for entry in evidence.accepted}
    if keys != accepted:
        odd = set(keys.items()) ^ set(accepted.items())
        yield f"keys and jobs differ from what was accepted: {odd}"
    if set(jobs) != set(accepted.values()):
        yield f"the jobs differ from those accepted: {set(jobs) ^ set(accepted.values())}"
    for job in jobs.values():
        if job.status != "succeeded":
            yield f"{job.id} is {job.status}: {job.error}"
        if job.worker_id is not None or job.lease_expires_epoch is not None:
            yield f"{job.id} has ended and is still held by {job.worker_id}"


def versions_are_whole(evidence: Evidence, session: Session, store: ArtifactStore) -> Iterator[str]:
    """Each succeeded job has one version, whole in the store; there is no other version."""
    versions = session.scalars(select(AdapterVersion)).all()
    published = defaultdict(list)
    for version in versions:
        published[version.job_id].append(version.id)
    for job in session.scalars(select(Job)):
        expected = [job.version_id] if job.status == "succeeded" else []
        if published.pop(job.id, []) != expected:
            yield f"{job.id} is {job.status} and has not the versions {expected}"
    yield from (f"versions {ids} are of no job" for ids in published.values())
    for version in versions:
        try:
            verify_files(
                store.adapter_path(version.digest), Manifest.model_validate(version.manifest)
            )
        except TunesmithError as error:
            yield f"version {version.id} of {version.job_id}: {error.message}"
    numbers: dict[str, dict[int, str]] = defaultdict(dict)
    for version in versions:
        numbers[version.adapter_id][version.version] = version.id
    for adapter_id, found in numbers.items():
        if sorted(found) != list(range(1, len(found) + 1)):
            yield f"adapter {adapter_id} has the versions {sorted(found)}"
    for alias in session.scalars(select(AdapterAlias)):
        newest = max(numbers[alias.adapter_id])
        if alias.version_id != numbers[alias.adapter_id][newest]:
            yield f"{alias.alias} of {alias.adapter_id} is not at the newest version {newest}"


def events_have_no_gap(evidence: Evidence, session: Session, _: ArtifactStore) -> Iterator[str]:
    """Events are numbered from 1 to the last without a gap, and tell of one end."""
    sequences: dict[str, list[int]] = defaultdict(list)
    ends: Counter[str] = Counter()
    for event in session.scalars(select(JobEvent).order_by(JobEvent.sequence)):
        sequences[event.job_id].append(event.sequence)
        ends[event.job_id] += event.type in TERMINAL
    for job in session.scalars(select(Job)):
        if sequences[job.id] != list(range(1, job.last_event + 1)):
            yield f"{job.id} has the events {sequences[job.id]}, the last is {job.last_event}"
        if ends[job.id] != 1 + evidence.retried.get(job.id, 0):
            yield f"{job.id} has {ends[job.id]} events that tell of its end"


def metrics_are_of_one_attempt(
    evidence: Evidence, session: Session, _: ArtifactStore
) -> Iterator[str]:
    """Each step of a job was measured by one attempt, and a succeeded job lacks none."""
    attempts: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    query = select(JobMetric.job_id, JobMetric.step, JobMetric.attempt, JobMetric.loss)
    for job_id, step, attempt, loss in session.execute(query):
        attempts[job_id][step].append(attempt)
        if loss is None:
            yield f"{job_id} has no loss at step {step} of attempt {attempt}"
    for job in session.scalars(select(Job)):
        steps = attempts[job.id]
        doubled = {step: found for step, found in steps.items() if len(found) > 1}
        if doubled:
            yield f"{job.id} has steps of several attempts: {doubled}"
        expected = list(range(1, job.spec["training"]["max_steps"] + 1))
        if job.status == "succeeded" and sorted(steps) != expected:
            yield f"{job.id} lacks the steps {sorted(set(expected) ^ set(steps))}"


ROW_CHECKS: Final[tuple[RowCheck, ...]] = (
    jobs_ended_once,
    versions_are_whole,
    events_have_no_gap,
    metrics_are_of_one_attempt,
)


def _answers(evidence: Evidence, _: ArtifactStore) -> Iterator[str]:
    """Each published version answers over HTTP, under its digest."""
    with evidence.database.session() as session:
        names = {adapter.id: adapter.name for adapter in session.scalars(select(Adapter))}
        versions = session.scalars(select(AdapterVersion)).all()
    for version in versions:
        reference = f"{names[version.adapter_id]}@{version.version}"
        answer = _generate(evidence.cluster, reference)
        if answer.status_code != 200:
            yield f"{reference} answers {answer.status_code}: {answer.text[:300]}"
        elif answer.json()["adapter"]["digest"] != version.digest:
            yield f"{reference} answers as {answer.json()['adapter']}"


def _generate(cluster: Cluster, reference: str) -> httpx2.Response:
    answers: list[httpx2.Response] = []

    def answered() -> bool:
        body = {"prompt": "item", "max_new_tokens": 2}
        answers.append(cluster.client.post("/generate", params={"adapter": reference}, json=body))
        return answers[-1].status_code != 503

    with contextlib.suppress(AssertionError):
        wait_until(answered, _GENERATE_SECONDS, "it stays away")
    return answers[-1]


def _weights(evidence: Evidence, store: ArtifactStore) -> Iterator[str]:
    """Each published adapter is, bit by bit, what an undisturbed run of the same spec makes."""
    with evidence.database.session() as session:
        digests = {
            version.job_id: version.digest
            for version in session.scalars(select(AdapterVersion))
            if version.job_id is not None
        }
        specs = {job.id: job.spec for job in session.scalars(select(Job)) if job.id in digests}
        bases = {model.name: to_ref(model) for model in session.scalars(select(BaseModel))}
        dataset = session.scalars(select(Dataset)).one()
    expected = train_undisturbed(
        evidence.directory,
        specs,
        bases,
        store.blob_path(dataset.sha256),
        dataset.format,
        trainers=os.cpu_count() or 1,
    )
    for job_id, digest in digests.items():
        if expected.get(job_id) != digest:
            yield f"{job_id} published {digest[:12]} and not {str(expected.get(job_id))[:12]}"


def _processes(evidence: Evidence, _: ArtifactStore) -> Iterator[str]:
    """All parts stop when they are asked to, and no process is left."""
    for part, code in evidence.cluster.stop().items():
        if code != 0:
            yield f"{part} stopped with exit code {code}"
    for process in evidence.cluster.processes():
        yield f"a process is left: {' '.join(process.cmdline())}"


def _work(evidence: Evidence, *_: object) -> Iterator[str]:
    """No worker keeps files of attempts that are over."""
    nodes = evidence.cluster.data_dir.parent / "nodes"

    def left() -> list[Path]:
        return list(nodes.glob("*/work/*"))

    with contextlib.suppress(AssertionError):
        wait_until(lambda: not left(), _WORK_SECONDS, "it stays")
    yield from (f"left in a work directory: {path}" for path in left())


def store_has_what_is_referenced(evidence: Evidence, store: ArtifactStore) -> Iterator[str]:
    """After garbage collection the store holds what the database refers to, and that is all."""
    settings = evidence.settings.model_copy(
        update={"gc_grace_seconds": 0.0, "keep_checkpoints_seconds": 0.0}
    )
    _age(Path(settings.artifact_url.removeprefix("file://")) / "tmp")
    report = clean(evidence.database, store, settings)
    if report.refused:
        yield f"garbage collection was refused: {report.refused}"
    with evidence.database.session() as session:
        checkpoints = set(session.scalars(select(JobCheckpoint.sha256)))
        blobs = set(session.scalars(select(Dataset.sha256))) | checkpoints
        adapters = set(session.scalars(select(AdapterVersion.digest)))
    if checkpoints:
        yield f"{len(checkpoints)} checkpoints of ended jobs are left"
    yield from _difference("blobs", {entry.name for entry in store.list_blobs()}, blobs)
    yield from _difference("adapters", {entry.name for entry in store.list_adapters()}, adapters)
    yield from _difference("temporary", {entry.name for entry in store.list_temporary()}, set())


def _difference(kind: str, stored: set[str], referenced: set[str]) -> Iterator[str]:
    if missing := referenced - stored:
        yield f"{kind} that are referenced are missing: {sorted(missing)}"
    if orphans := stored - referenced:
        yield f"{kind} that nothing refers to are left: {sorted(orphans)}"


def _age(directory: Path) -> None:
    """Make what interrupted writers left behind old enough to be removed."""
    long_ago = time.time() - _LONG_AGO_SECONDS
    for path in [directory, *directory.rglob("*")]:
        os.utime(path, (long_ago, long_ago))

"""Everything that can happen to jobs, in any order, against a model of what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as bounds
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select, update

from core import jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.models import (
    Adapter,
    AdapterAlias,
    AdapterVersion,
    Dataset,
    Job,
    JobEvent,
    Lease,
    UsageTotal,
)
from core.db.session import Database
from core.errors import Conflict, LeaseLost
from core.job_status import MOVES, TERMINAL
from core.specs import LAST_RUNG
from core.storage import ArtifactStore, PublishedAdapter
from tests.support.factories import add_base_model, publish_artifact, submit

MOST_JOBS = 4
MAX_ATTEMPTS = 3
ERROR = {"code": "broken", "message": "it broke"}
EVERY_EVENT = {
    "created",
    "validation_started",
    "validated",
    "training_started",
    "log",
    "released",
    "requeued",
    "pause_requested",
    "pause_withdrawn",
    "paused",
    "unpaused",
    "cancel_requested",
    "cancelled",
    "retried",
    "priority_changed",
    "failed",
    "succeeded",
}
WAYS_TO_LET_GO = ["release"] * 2 + ["fail", "stop", "succeed", "die", "out of memory", "vanish"]
some_job = st.integers(0, MOST_JOBS - 1)
some_priority = st.integers(-2, 2)


@dataclass
class Model:
    """What a job must look like."""

    id: str
    priority: int
    status: str = "validating"
    validated: bool = False
    held: jobs.Claim | None = None
    worker: str | None = None
    stop_requested: str | None = None
    attempt: int = 0
    lost_attempts: int = 0
    memory_rung: int = 0
    events: list[str] = field(default_factory=lambda: ["created"])
    past: list[tuple[jobs.Claim, str]] = field(default_factory=list)

    def move(self, status: str, *events: str) -> None:
        assert status in MOVES[self.status], f"{self.status} → {status}"
        self.status = status
        self.events += events

    def let_go(self, status: str, event: str) -> None:
        """Wait again, unless the owner wants something else."""
        assert self.held is not None
        assert self.worker is not None
        self.past.append((self.held, self.worker))
        self.held = self.worker = None
        self.move(status, event)
        wanted, self.stop_requested = self.stop_requested, None
        if wanted is not None and status not in TERMINAL:
            wanted = {"cancel": "cancelled", "pause": "paused"}[wanted]
            self.move(wanted, wanted)

    @property
    def waits(self) -> bool:
        return self.status in ("validating", "queued") and self.held is None


class JobMachine(RuleBasedStateMachine):
    """Jobs of one project, their owner, their workers and the sweep.

    Args:
        database: Emptied of jobs afterwards.
        store: Holds `artifact`.
        settings: For submissions.
        artifact: What every job publishes.
        seen: Gets the type of every event that happened.
    """

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        settings: Settings,
        artifact: PublishedAdapter,
        seen: set[str],
    ) -> None:
        super().__init__()
        self.seen = seen
        self.database, self.store, self.settings = database, store, settings
        self.artifact = artifact
        self.jobs: list[Model] = []
        self.workers = 0

    # What owners do.

    @initialize()
    def begin(self) -> None:
        """Have something to work on: jobs that wait for either stage."""
        for _ in range(2):
            self.submit(0)
            self.claim("validate")
            self.validated(0)
        self.submit(0)

    @precondition(lambda self: len(self.jobs) < MOST_JOBS)
    @rule(priority=some_priority)
    def submit(self, priority: int) -> None:
        job = submit(self.database, self.store, self.settings, priority=priority)
        self.jobs.append(Model(job.id, priority))

    @precondition(lambda self: self.jobs)
    @rule(index=some_job)
    def cancel(self, index: int) -> None:
        job = self.pick(index)
        if job.status in ("succeeded", "failed"):
            self.refused(job, jobs.cancel, "job_finished")
            return
        self.allowed(job, jobs.cancel)
        if job.waits or job.status == "paused":
            job.move("cancelled", "cancelled")
        elif job.held and job.stop_requested != "cancel":
            job.stop_requested = "cancel"
            job.events.append("cancel_requested")

    @precondition(lambda self: self.jobs)
    @rule(index=some_job)
    def pause(self, index: int) -> None:
        job = self.pick(index)
        if job.status in TERMINAL:
            self.refused(job, jobs.pause, "job_finished")
        elif job.stop_requested == "cancel":
            self.refused(job, jobs.pause, "cancel_requested")
        else:
            self.allowed(job, jobs.pause)
            if job.waits:
                job.move("paused", "paused")
            elif job.held and job.stop_requested is None:
                job.stop_requested = "pause"
                job.events.append("pause_requested")

    @precondition(lambda self: self.jobs)
    @rule(index=some_job)
    def resume(self, index: int) -> None:
        job = self.pick(index)
        if job.status == "paused":
            self.allowed(job, jobs.resume)
            job.move("queued" if job.validated else "validating", "unpaused")
        elif job.stop_requested == "pause":
            self.allowed(job, jobs.resume)
            job.stop_requested = None
            job.events.append("pause_withdrawn")
        else:
            self.refused(job, jobs.resume, "job_not_paused")

    @precondition(lambda self: self.jobs)
    @rule(index=some_job)
    def retry(self, index: int) -> None:
        job = self.pick(index)
        if job.status in ("failed", "cancelled"):
            self.allowed(job, jobs.retry, settings=self.settings)
            job.move("queued" if job.validated else "validating", "retried")
            job.lost_attempts = 0
        else:
            code = "job_finished" if job.status == "succeeded" else "job_not_finished"
            self.refused(job, jobs.retry, code, settings=self.settings)

    @precondition(lambda self: self.jobs)
    @rule(index=some_job, priority=some_priority)
    def set_priority(self, index: int, priority: int) -> None:
        job = self.pick(index)
        if job.status in TERMINAL:
            self.refused(job, jobs.set_priority, "job_finished", priority=priority)
            return
        self.allowed(job, jobs.set_priority, priority=priority)
        if priority != job.priority:
            job.priority = priority
            job.events.append("priority_changed")

    @precondition(lambda self: self.jobs)
    @rule(index=some_job)
    def delete(self, index: int) -> None:
        job = self.pick(index)
        if job.status in TERMINAL:
            self.allowed(job, jobs.delete)
            self.jobs.remove(job)
        else:
            self.refused(job, jobs.delete, "job_not_finished")

    # What workers do.

    @rule(stage=st.sampled_from(["validate", "train", "train"]))
    def claim(self, stage: jobs.Stage) -> None:
        status = {"validate": "validating", "train": "queued"}[stage]
        waiting = [job for job in self.jobs if job.status == status and job.held is None]
        self.workers += 1
        worker = f"w{self.workers}"
        claim = jobs.claim(self.database, worker_id=worker, stage=stage, lease_seconds=600)
        if not waiting:
            assert claim is None
            return
        best = min(waiting, key=lambda job: (-job.priority, job.id))
        assert claim is not None
        assert (claim.job_id, claim.attempt) == (best.id, best.attempt + 1)
        best.attempt += 1
        best.held, best.worker = claim, worker
        started = {"validate": "validation_started", "train": "training_started"}[stage]
        best.move("validating" if stage == "validate" else "running", started)

    @precondition(lambda self: self.held())
    @rule(index=some_job)
    def heartbeat(self, index: int) -> None:
        job, claim, worker = self.holder(index)
        assert jobs.heartbeat(self.database, claim, worker, 600) == job.stop_requested

    @precondition(lambda self: self.held())
    @rule(index=some_job)
    def record(self, index: int) -> None:
        job, claim, worker = self.holder(index)
        updates: list[jobs.Update] = [jobs.ProgressUpdate(step=3), jobs.EventUpdate("log")]
        jobs.record(self.database, claim, worker, updates)
        job.events.append("log")

    @precondition(lambda self: self.held("validate"))
    @rule(index=some_job)
    def validated(self, index: int) -> None:
        job, claim, worker = self.holder(index, "validate")
        jobs.validated(self.database, claim, worker, {"rows": 1})
        job.validated = True
        job.let_go("queued", "validated")

    # One rule for all of these, so that jobs are held long enough for their owners to act.
    @precondition(lambda self: self.held())
    @rule(
        index=some_job,
        way=st.sampled_from(WAYS_TO_LET_GO),
    )
    def let_go(self, index: int, way: str) -> None:
        job, claim, worker = self.holder(index)
        match way:
            case "release":
                jobs.release(self.database, claim, worker)
                job.let_go("queued" if claim.stage == "train" else "validating", "released")
            case "stop":
                jobs.cancelled(self.database, claim, worker)
                job.let_go("cancelled", "cancelled")
            case "succeed" if claim.stage == "train":
                self.publish(claim, worker)
                job.let_go("succeeded", "succeeded")
            case "fail" | "succeed":
                jobs.fail(self.database, claim, worker, ERROR)
                job.let_go("failed", "failed")
            case "vanish":
                with self.database.session(write=True) as session:
                    session.execute(
                        update(Job).where(Job.id == job.id).values(lease_expires_epoch=1.0)
                    )
                assert jobs.sweep(self.database, "sweeper", 600, MAX_ATTEMPTS) == 1
                self.lose(job, None)
            case _:
                rung = min(job.memory_rung + 1, LAST_RUNG) if way == "out of memory" else None
                jobs.attempt_lost(
                    self.database,
                    claim,
                    worker,
                    reason="it died",
                    max_attempts=MAX_ATTEMPTS,
                    next_rung=rung,
                )
                self.lose(job, rung)

    @rule()
    def sweep_in_vain(self) -> None:
        assert jobs.sweep(self.database, "sweeper", 600, MAX_ATTEMPTS) == 0

    @precondition(lambda self: any(job.past for job in self.jobs))
    @rule(index=some_job, age=st.integers(1, 3), kind=st.integers(0, 7))
    def zombie_writes(self, index: int, age: int, kind: int) -> None:
        """Have a worker that was taken for dead write; that must change nothing."""
        candidates = [job for job in self.jobs if job.past]
        job = candidates[index % len(candidates)]
        claim, worker = job.past[-min(age, len(job.past))]
        database = self.database
        writes: list[Callable[[], object]] = [
            lambda: jobs.heartbeat(database, claim, worker, 600),
            lambda: jobs.record(database, claim, worker, [jobs.EventUpdate("log")]),
            lambda: jobs.release(database, claim, worker),
            lambda: jobs.fail(database, claim, worker, ERROR),
            lambda: jobs.cancelled(database, claim, worker),
            lambda: jobs.validated(database, claim, worker, {}),
            lambda: jobs.attempt_lost(database, claim, worker, reason="x", max_attempts=1),
            lambda: self.publish(claim, worker),
        ]
        before = self.rows()
        with pytest.raises(LeaseLost):
            writes[kind]()
        assert self.rows() == before

    # What must hold at any time.

    @invariant()
    def jobs_are_as_the_model_says(self) -> None:
        with self.database.session() as session:
            rows = {row.id: row for row in session.scalars(select(Job))}
            events = session.execute(
                select(JobEvent.job_id, JobEvent.sequence, JobEvent.type).order_by(
                    JobEvent.job_id, JobEvent.sequence
                )
            ).all()
        assert rows.keys() == {job.id for job in self.jobs}
        for job in self.jobs:
            row = rows[job.id]
            assert (row.status, row.stop_requested) == (job.status, job.stop_requested)
            assert (row.attempt, row.worker_id) == (job.attempt, job.worker)
            assert (row.lease_expires_epoch is None) == (job.held is None)
            assert (row.lost_attempts, row.memory_rung) == (job.lost_attempts, job.memory_rung)
            assert (row.validated, row.priority) == (job.validated, job.priority)
            assert (row.queue_rank, row.spec["priority"]) == (-job.priority, job.priority)
            assert (row.finished_at is not None) == (job.status in TERMINAL)
            assert (row.error is not None) == (job.status == "failed")
            assert (row.version_id is not None) == (job.status == "succeeded")
            told = [(number, kind) for job_id, number, kind in events if job_id == job.id]
            assert told == list(enumerate(job.events, 1))
            assert row.last_event == len(told)
            self.seen.update(job.events)

    def teardown(self) -> None:
        tables = (Job, AdapterAlias, AdapterVersion, Adapter, Dataset, UsageTotal, Lease)
        with self.database.session(write=True) as session:
            for table in tables:
                session.execute(delete(table))

    # Words of the rules above.

    def pick(self, index: int) -> Model:
        return self.jobs[index % len(self.jobs)]

    def held(self, stage: str | None = None) -> list[Model]:
        return [job for job in self.jobs if job.held and stage in (None, job.held.stage)]

    def holder(self, index: int, stage: str | None = None) -> tuple[Model, jobs.Claim, str]:
        held = self.held(stage)
        job = held[index % len(held)]
        assert job.held is not None
        assert job.worker is not None
        return job, job.held, job.worker

    def allowed(self, job: Model, action: Callable[..., object], **details: Any) -> None:
        with self.database.session(write=True) as session:
            action(session, LOCAL, job.id, **details)

    def refused(self, job: Model, action: Callable[..., object], code: str, **details: Any) -> None:
        with self.database.session(write=True) as session, pytest.raises(Conflict) as caught:
            action(session, LOCAL, job.id, **details)
        assert caught.value.code == code

    def lose(self, job: Model, rung: int | None) -> None:
        smaller = rung is not None and rung > job.memory_rung
        job.lost_attempts += 0 if smaller else 1
        if job.lost_attempts >= MAX_ATTEMPTS and job.stop_requested != "cancel":
            job.let_go("failed", "failed")
            return
        job.memory_rung = job.memory_rung if rung is None else rung
        job.let_go("queued" if job.status == "running" else "validating", "requeued")

    def publish(self, claim: jobs.Claim, worker: str) -> None:
        jobs.succeed(
            self.database,
            claim,
            worker,
            manifest=self.artifact.manifest,
            bytes=self.artifact.bytes,
            report={},
            provenance={},
            store=self.store,
        )

    def rows(self) -> list[dict[str, Any]]:
        with self.database.session() as session:
            return [
                dict(row)
                for table in (Job, JobEvent, AdapterVersion, UsageTotal)
                for row in session.execute(
                    select(table.__table__).order_by(*table.__table__.primary_key)
                ).mappings()
            ]


def test_whatever_happens_to_jobs_comes_out_as_it_must(
    database: Database, store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    add_base_model(database)
    artifact = publish_artifact(store, tmp_path / "artifact")
    seen: set[str] = set()
    run_state_machine_as_test(
        lambda: JobMachine(database, store, settings, artifact, seen),
        settings=_bounded(),
    )
    assert EVERY_EVENT - seen == set(), "the runs were too short to mean anything"


def _bounded() -> bounds:
    return bounds(
        max_examples=25,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        # A failure is not made smaller, which takes minutes: the steps are printed anyway.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

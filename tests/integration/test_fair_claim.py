"""Which waiting job a worker gets: priority, turns between projects, what it can run, age."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from core import jobs
from core.auth import Principal
from core.capabilities import ANY, Capabilities
from core.config import Settings
from core.db.models import Job, Project, utc_now
from core.db.repositories.queue import PATIENCE_SECONDS
from core.db.session import Database
from core.ids import new_id
from core.storage import ArtifactStore
from tests.support.factories import add_base_model, add_dataset, add_project, make_spec

GIB = 1024**3
Add = Callable[..., str]


@pytest.fixture
def add(database: Database, store: ArtifactStore) -> Add:
    """Insert a job that waits for training, of a project by name."""
    add_base_model(database)
    datasets: dict[str, tuple[Principal, str]] = {}

    def insert(project: str = "a", *, priority: int = 0, **columns: Any) -> str:
        if project not in datasets:
            owner = add_project(database, project)
            datasets[project] = owner, add_dataset(database, store, owner).id
        owner, dataset = datasets[project]
        spec = make_spec(dataset=dataset, adapter="bot", priority=priority)
        values = {
            "base_model": "tiny",
            "status": "queued",
            "validated": True,
            "priority": priority,
            "queue_rank": -priority,
        } | columns
        job = Job(
            id=new_id("job"),
            project_id=owner.project_id,
            dataset_id=dataset,
            adapter_name="bot",
            spec=spec.model_dump(mode="json"),
            **values,
        )
        with database.session(write=True) as session:
            session.add(job)
        return job.id

    return insert


def claim(
    database: Database,
    worker: Capabilities = ANY,
    *,
    stage: jobs.Stage = "train",
    running_quota: int = 0,
    worker_id: str = "w",
) -> jobs.Claim | None:
    return jobs.claim(
        database,
        worker_id=worker_id,
        stage=stage,
        lease_seconds=30,
        worker=worker,
        running_quota=running_quota,
    )


def taken(database: Database, worker: Capabilities = ANY, **options: Any) -> str | None:
    found = claim(database, worker, **options)
    return found.job_id if found else None


def test_a_long_queue_of_one_project_does_not_hold_up_another(database: Database, add: Add) -> None:
    many = [add("a") for _ in range(50)]
    one = add("b")
    assert [taken(database) for _ in range(4)] == [many[0], one, many[1], many[2]]


def test_projects_take_turns_when_one_worker_does_all_their_jobs(
    database: Database, add: Add
) -> None:
    ids = {project: [add(project) for _ in range(3)] for project in ("a", "b", "c")}
    order = []
    for _ in range(9):
        found = claim(database)
        assert found is not None
        order.append(found.job_id)
        jobs.fail(database, found, "w", {"code": "x", "message": "y"})
    assert order == [ids[project][turn] for turn in range(3) for project in ("a", "b", "c")]


def test_the_project_with_the_fewest_jobs_at_work_is_next(database: Database, add: Add) -> None:
    crowd = [add("a"), add("a")]
    assert [taken(database), taken(database)] == crowd
    late = [add("b"), add("b")]
    assert taken(database) == late[0]
    add("a")
    assert taken(database) == late[1], "b had its turn later, but has less at work"


def test_priority_goes_before_turns_and_age_last(database: Database, add: Add) -> None:
    low, old, young, urgent = (
        add("a", priority=-1),
        add("a"),
        add("a"),
        add("b", priority=5),
    )
    second = add("b", priority=5)
    assert [taken(database) for _ in range(5)] == [urgent, second, old, young, low]
    assert taken(database) is None


def test_validations_take_turns_of_their_own(database: Database, add: Add) -> None:
    many = [add("a", status="validating", validated=False) for _ in range(3)]
    one = add("b", status="validating", validated=False)
    trained = add("b"), add("a")
    assert [taken(database, stage="validate") for _ in range(3)] == [many[0], one, many[1]]
    assert [taken(database), taken(database)] == list(trained), "by age: no turn was taken yet"


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (Capabilities(), {"any", "gpu", "large", "other"}),
        (Capabilities(device="cpu"), {"any", "large", "other"}),
        (Capabilities(device="cuda"), {"any", "gpu", "large", "other"}),
        (Capabilities(device="cpu", memory_bytes=8 * GIB), {"any", "other"}),
        (Capabilities(device="cuda", memory_bytes=8 * GIB), {"any", "gpu", "large", "other"}),
        (Capabilities(device="cuda", memory_bytes=2 * GIB), {"any", "other"}),
        (Capabilities(absent_base_models=frozenset({"second"})), {"any", "gpu", "large"}),
    ],
)
def test_a_worker_gets_only_what_it_can_run(
    database: Database, add: Add, worker: Capabilities, expected: set[str]
) -> None:
    add_base_model(database, "second", digest="c" * 64)
    names = {
        add(required_device="cuda", required_cuda_memory_bytes=4 * GIB): "gpu",
        add(required_memory_bytes=16 * GIB, required_cuda_memory_bytes=8 * GIB): "large",
        add(): "any",
        add(base_model="second"): "other",
    }
    found = set()
    while (job_id := taken(database, worker)) is not None:
        found.add(names[job_id])
    assert found == expected


def test_a_validation_needs_no_device_but_the_base_models_files(
    database: Database, add: Add
) -> None:
    job = add(status="validating", validated=False, required_device="cuda")
    elsewhere = Capabilities(device="cpu", absent_base_models=frozenset({"tiny"}))
    assert taken(database, elsewhere, stage="validate") is None
    assert taken(database, Capabilities(device="cpu", memory_bytes=1), stage="validate") == job


def test_a_project_has_no_more_jobs_in_training_than_its_quota(
    database: Database, add: Add
) -> None:
    first, second, _ = (add("a") for _ in range(3))
    free = [add("b") for _ in range(3)]
    with database.session(write=True) as session:
        session.execute(update(Project).where(Project.name == "b").values(max_running_jobs=0))
    assert {taken(database, running_quota=1) for _ in range(4)} == {first, *free}
    assert taken(database, running_quota=1) is None
    with database.session(write=True) as session:
        session.execute(update(Project).where(Project.name == "a").values(max_running_jobs=2))
    assert taken(database, running_quota=1) == second
    assert taken(database, running_quota=1) is None
    waiting = add("a", status="validating", validated=False)
    assert taken(database, stage="validate", running_quota=1) == waiting


def test_a_warm_base_model_is_preferred_within_a_project(database: Database, add: Add) -> None:
    add_base_model(database, "second", digest="c" * 64)
    urgent = add("a", priority=1)
    cold, warm = add("a"), add("a", base_model="second")
    other = add("b")
    worker = Capabilities(warm_base="second")
    assert taken(database, worker) == urgent, "not before a more urgent one"
    assert taken(database, worker) == other, "not before another project's turn"
    assert [taken(database, worker), taken(database, worker)] == [warm, cold]


def test_no_job_is_passed_over_for_ever(database: Database, add: Add) -> None:
    add_base_model(database, "second", digest="c" * 64)
    long_ago = utc_now() - timedelta(seconds=PATIENCE_SECONDS + 60)
    patient = add("a", created_at=long_ago)
    warm = add("a", base_model="second")
    worker = Capabilities(warm_base="second")
    assert [taken(database, worker), taken(database, worker)] == [patient, warm]


def test_racing_workers_take_every_job_once_and_leave_none(database: Database, add: Add) -> None:
    waiting = {add(project) for project in ("a", "b") for _ in range(20)}
    start = threading.Barrier(8)

    def work(number: int) -> list[str]:
        start.wait()
        mine = []
        while (job_id := taken(database, worker_id=f"w{number}")) is not None:
            mine.append(job_id)
        # Whoever came home empty must have been right.
        with database.session() as session:
            assert session.scalar(select(Job.id).where(Job.status == "queued")) is None
        return mine

    with ThreadPoolExecutor(8) as pool:
        found = [job_id for mine in pool.map(work, range(8)) for job_id in mine]
    assert len(found) == len(waiting)
    assert set(found) == waiting


def test_racing_workers_keep_to_the_quota(database: Database, add: Add) -> None:
    for _ in range(10):
        add("a")
    start = threading.Barrier(8)

    def work(number: int) -> str | None:
        start.wait()
        return taken(database, worker_id=f"w{number}", running_quota=3)

    with ThreadPoolExecutor(8) as pool:
        found = [job_id for job_id in pool.map(work, range(8)) if job_id is not None]
    assert len(set(found)) == len(found) == 3


@pytest.mark.postgres
class TestBesideAnOwner:
    """While an owner changes the best job, his transaction has its row locked."""

    @pytest.fixture
    def database(self, postgres_database: Database) -> Database:
        return postgres_database

    def test_the_next_project_is_served(self, database: Database, add: Add) -> None:
        locked, other = add("a"), add("b")
        with database.session(write=True) as session:
            session.execute(select(Job.id).where(Job.id == locked).with_for_update())
            assert taken(database) == other

    def test_the_job_is_waited_for_when_it_is_the_only_one(
        self, database: Database, add: Add
    ) -> None:
        locked = add("a")
        with ThreadPoolExecutor(1) as pool:
            with database.session(write=True) as session:
                session.execute(select(Job.id).where(Job.id == locked).with_for_update())
                asked = pool.submit(taken, database)
                with pytest.raises(TimeoutError):
                    asked.result(0.1)
            assert asked.result(5) == locked


def test_the_defaults_of_the_settings_limit_nothing_but_the_queue(settings: Settings) -> None:
    assert (settings.quota_queued_jobs, settings.quota_running_jobs) == (1000, 0)
    assert (settings.quota_stored_rows, settings.quota_stored_bytes) == (0, 0)

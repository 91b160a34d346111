"""Whatever was stored, registered, deleted or interrupted: nothing referenced is ever removed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import delete, select

from core import datasets, registry
from core.config import Settings
from core.db.models import AdapterVersion, Base, Dataset, Job, JobCheckpoint
from core.db.session import Database
from core.errors import Unavailable
from core.housekeeping import Report, clean, tidy
from core.housekeeping.garbage import collect_garbage
from core.principal import DEFAULT_PROJECT_ID, LOCAL
from core.storage import ArtifactStore, LocalStore, PublishedAdapter, open_store
from tests.support.aging import AgingStore
from tests.support.factories import (
    add_base_model,
    add_dataset,
    make_artifact,
    publish_artifact,
    queue_job,
)
from tests.support.polling import wait_until

GRACE_SECONDS = 3600.0
CONTENTS = [f"content {number}\n".encode() for number in range(4)]
CONTENT_HASH = hashlib.sha256(CONTENTS[0]).hexdigest()
SEEDS = range(3)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of adapters that differ."""
    directories = [tmp_path_factory.mktemp("artifacts") / str(seed) for seed in SEEDS]
    for seed, directory in zip(SEEDS, directories, strict=True):
        make_artifact(directory, seed=seed)
    return directories


class World:
    """A database and a store, and all that can happen to them, interruptions included."""

    def __init__(self, database: Database, store: AgingStore, artifacts: list[Path]) -> None:
        self.database = database
        self.store = store
        self._artifacts = artifacts

    def upload(self, number: int, register: bool, old: bool) -> None:
        blob = self.store.write_blob([CONTENTS[number]], 1000)
        if register:
            with self.database.session(write=True) as session:
                datasets.create(
                    session,
                    LOCAL,
                    filename="rows.jsonl",
                    blob=blob,
                    format="messages",
                    rows=1,
                    report={},
                    store=self.store,
                )
        if old:
            self.store.age(blob.sha256)

    def checkpoint(self, number: int, register: bool, old: bool) -> None:
        blob = self.store.write_blob([CONTENTS[number]], 1000)
        if register:
            with self.database.session(write=True) as session:
                taken = len(session.scalars(select(JobCheckpoint)).all())
                job_id = f"job-{taken}"
                session.add(_job(job_id, status="running"))
                session.flush()
                session.add(
                    JobCheckpoint(
                        job_id=job_id, step=1, attempt=1, sha256=blob.sha256, bytes=blob.bytes
                    )
                )
        if old:
            self.store.age(blob.sha256)

    def publish(self, number: int, register: bool, old: bool) -> None:
        published = self.store.publish_adapter(self._artifacts[number % len(SEEDS)])
        if register:
            register_version(self.database, as_store(self.store), published)
        if old:
            self.store.age(published.digest)

    def delete_dataset(self, number: int, discard: bool, _: bool) -> None:
        with self.database.session() as session:
            ids = session.scalars(select(Dataset.id).order_by(Dataset.id)).all()
        if ids:
            with self.database.session(write=True) as session:
                sha256 = datasets.delete(session, LOCAL, ids[number % len(ids)])
            if discard:
                datasets.discard_blob(self.database, self.store, sha256)

    def drop_checkpoint(self, number: int, discard: bool, _: bool) -> None:
        with self.database.session(write=True) as session:
            rows = session.scalars(select(JobCheckpoint).order_by(JobCheckpoint.job_id)).all()
            row = rows[number % len(rows)] if rows else None
            if row:
                session.execute(delete(Job).where(Job.id == row.job_id))
        if row and discard:
            datasets.discard_blob(self.database, self.store, row.sha256)

    def delete_version(self, number: int, discard: bool, _: bool) -> None:
        with self.database.session() as session:
            rows = session.scalars(select(AdapterVersion).order_by(AdapterVersion.id)).all()
        if rows:
            version = rows[number % len(rows)].version
            with self.database.session(write=True) as session:
                digest = registry.delete_version(session, LOCAL, "bot", version, force=True)
            if discard:
                registry.discard_artifact(self.database, self.store, digest)

    def collect(self, *_: object) -> None:
        before, young = self.names(), self.young_names()
        report = self.run(GRACE_SECONDS)
        after, referenced = self.names(), self.referenced()
        assert after == before & (referenced | young)
        assert referenced <= after
        assert sum(removed.count for removed in report.removed.values()) == len(before - after)

    def preview(self, *_: object) -> None:
        before = self.names()
        expected = before - self.referenced() - self.young_names()
        report = self.run(GRACE_SECONDS, dry_run=True)
        assert sum(removed.count for removed in report.removed.values()) == len(expected)
        assert self.names() == before

    def run(self, grace_seconds: float, **options: bool) -> Report:
        report = Report()
        collect_garbage(
            self.database, as_store(self.store), grace_seconds, report, force=True, **options
        )
        return report

    def names(self) -> set[str]:
        return {e.name for e in (*self.store.list_blobs(), *self.store.list_adapters())}

    def young_names(self) -> set[str]:
        entries = (*self.store.list_blobs(), *self.store.list_adapters())
        return {entry.name for entry in entries if entry.age_seconds < GRACE_SECONDS}

    def referenced(self) -> set[str]:
        with self.database.session() as session:
            columns = (Dataset.sha256, JobCheckpoint.sha256, AdapterVersion.digest)
            return {name for column in columns for name in session.scalars(select(column))}


ACTIONS = [
    World.upload, World.upload, World.checkpoint, World.publish, World.delete_dataset,
    World.drop_checkpoint, World.delete_version, World.collect, World.preview,
]  # fmt: skip
histories = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(0, len(CONTENTS) - 1),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=25,
)


def live(world: World, history: list[tuple[Callable[..., None], int, bool, bool]]) -> None:
    empty(world)
    for action, number, completes, old in history:
        action(world, number, completes, old)
        assert world.referenced() <= world.names(), action.__name__
    world.store.age_all()
    world.run(GRACE_SECONDS)
    assert world.names() == world.referenced()


def empty(world: World) -> None:
    with world.database.session(write=True) as session:
        for table in reversed(Base.metadata.sorted_tables):
            rows = table.delete()
            if table.name == "projects":
                rows = rows.where(table.c.id != DEFAULT_PROJECT_ID)
            session.execute(rows)
    for entry in world.store.list_blobs():
        world.store.delete_blob(entry.name)
    for entry in world.store.list_adapters():
        world.store.delete_adapter(entry.name)


MANY = hypothesis_settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(history=histories)
def test_nothing_referenced_is_ever_removed_and_all_else_is_in_the_end(
    sqlite_database: Database, store: LocalStore, artifacts: list[Path], history: Any
) -> None:
    live(World(sqlite_database, AgingStore(store), artifacts), history)


@pytest.mark.postgres
@hypothesis_settings(parent=MANY, max_examples=10)
@given(history=histories)
def test_the_same_holds_on_postgres(
    postgres_database: Database, store: LocalStore, artifacts: list[Path], history: Any
) -> None:
    live(World(postgres_database, AgingStore(store), artifacts), history)


@hypothesis_settings(parent=MANY, max_examples=3)
@given(history=histories)
def test_the_same_holds_of_a_bucket(
    sqlite_database: Database, settings: Settings, s3_url: str, artifacts: list[Path], history: Any
) -> None:
    store = open_store(settings.model_copy(update={"artifact_url": s3_url}))
    live(World(sqlite_database, AgingStore(store), artifacts), history)


def test_what_is_registered_never_misses_its_bytes_while_garbage_is_collected(
    database: Database, store: LocalStore, artifacts: list[Path]
) -> None:
    stop, failures = threading.Event(), list[BaseException]()
    counts = {"uploads": 0, "versions": 0, "refused": 0, "blobs": 0, "adapters": 0}
    wanted = {"uploads": 15, "versions": 10, "blobs": 5, "adapters": 5}

    def in_a_loop(action: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    try:
                        action()
                    except Unavailable as error:
                        if error.code not in {"blob_gone", "artifact_gone"}:
                            raise
                        counts["refused"] += 1
            except BaseException as error:
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def upload_and_delete() -> None:
        dataset = add_dataset(database, store, content=CONTENTS[0])
        counts["uploads"] += 1
        with store.open_blob(CONTENT_HASH) as stream:
            assert stream.read() == CONTENTS[0]
        with database.session(write=True) as session:
            datasets.delete(session, LOCAL, dataset.id)

    def publish_and_delete() -> None:
        published = store.publish_adapter(artifacts[0])
        version = register_version(database, store, published)
        counts["versions"] += 1
        for name, stream in store.open_adapter(published.digest).items():
            with stream:
                assert stream.read() == (artifacts[0] / name).read_bytes()
        with database.session(write=True) as session:
            registry.delete_version(session, LOCAL, "bot", version, force=True)

    def collect() -> None:
        report = Report()
        collect_garbage(database, store, 0, report, force=True)
        for kind in ("blobs", "adapters"):
            counts[kind] += report.removed[kind].count

    def enough() -> bool:
        return all(counts[name] >= count for name, count in wanted.items())

    threads = [in_a_loop(action) for action in (upload_and_delete, publish_and_delete, collect)]
    try:
        wait_until(lambda: stop.is_set() or enough(), 30, lambda: str(counts))
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures, failures


def test_real_ages_decide(database: Database, store: LocalStore, settings: Settings) -> None:
    kept = add_dataset(database, store)
    young = store.write_blob([b"young"], 100)
    old = store.write_blob([b"old"], 100)
    again = store.write_blob([b"again"], 100)
    for sha256 in (kept.sha256, old.sha256, again.sha256):
        _make_old(settings.root / "blobs" / sha256)
    store.write_blob([b"again"], 100)
    report = clean(database, store, settings)
    assert (report.removed["blobs"].count, report.removed["blobs"].bytes) == (1, 3)
    assert {entry.name for entry in store.list_blobs()} == {kept.sha256, young.sha256, again.sha256}


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(
    sqlite_database: Database, store: LocalStore, settings: Settings
) -> None:
    tmp = settings.root / "tmp"
    for name in ("old", "young"):
        (tmp / name).write_bytes(b"half")
        (tmp / f"{name}-adapter").mkdir()
        (tmp / f"{name}-adapter" / "weights").write_bytes(b"half of it")
    for path in (tmp / "old", tmp / "old-adapter" / "weights", tmp / "old-adapter"):
        _make_old(path)
    no_grace = settings.model_copy(update={"gc_grace_seconds": 0.001})
    report = clean(sqlite_database, store, no_grace)
    assert report.removed["temporary"].count == 2
    assert report.removed["temporary"].bytes == len(b"half" + b"half of it")
    assert {path.name for path in tmp.iterdir()} == {"young", "young-adapter"}


def test_the_store_of_another_database_is_left_alone(
    sqlite_database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    published = publish_artifact(store, tmp_path / "artifact")
    blob = store.write_blob([b"theirs"], 100)
    _make_old(settings.root / "blobs" / blob.sha256)
    for path in (settings.root / "adapters" / published.digest).iterdir():
        _make_old(path)
    _make_old(settings.root / "adapters" / published.digest)

    report = clean(sqlite_database, store, settings)
    assert report.refused is not None
    assert store.has_adapter(published.digest)
    assert store.has_blob(blob.sha256)
    report = clean(sqlite_database, store, settings, force=True)
    assert (report.removed["blobs"].count, report.removed["adapters"].count) == (1, 1)
    assert not store.has_adapter(published.digest)


def test_one_process_at_a_time_does_the_housekeeping_and_once_an_interval(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    quick = settings.model_copy(update={"gc_interval_seconds": 0.5})
    assert tidy(database, store, quick, "first") is not None
    assert tidy(database, store, quick, "second") is None
    assert tidy(database, store, quick, "first") is not None
    deadline = time.monotonic() + 5
    while tidy(database, store, quick, "second") is None:
        assert time.monotonic() < deadline, "the duty was never given up"
        time.sleep(0.05)


def test_what_a_job_trains_on_survives(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database)
    queue_job(database, store, settings)
    for path in (settings.root / "blobs").iterdir():
        _make_old(path)
    report = clean(database, store, settings)
    assert report.removed["blobs"].count == 0
    assert len(list(store.list_blobs())) == 1


def register_version(database: Database, store: ArtifactStore, published: PublishedAdapter) -> int:
    with database.session(write=True) as session:
        version = registry.publish(
            session,
            project_id=LOCAL.project_id,
            name="bot",
            base_model="tiny",
            manifest=published.manifest,
            bytes=published.bytes,
            origin="import",
            job_id=None,
            provenance={},
            store=store,
        )
        return version.version


def as_store(store: AgingStore) -> ArtifactStore:
    chosen: Any = store
    return chosen  # type: ignore[no-any-return]


def _job(job_id: str, **values: Any) -> Job:
    return Job(
        id=job_id,
        project_id=LOCAL.project_id,
        dataset_id="file-none",
        base_model="tiny",
        adapter_name="bot",
        spec={},
        **values,
    )


def _make_old(path: Path) -> None:
    os.utime(path, (0, 0))

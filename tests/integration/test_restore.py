"""Backups of both kinds of database and store come back in both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

import migrations
from core import auth, datasets, jobs, registry
from core.artifacts import tree_digest
from core.backup import create_backup, restore_backup
from core.config import Settings
from core.db.models import Job, JobCheckpoint, Project
from core.db.session import Database
from core.errors import Conflict, InvalidInput
from core.principal import LOCAL
from core.storage import LocalStore, open_store
from tests.support.backups import (
    backup,
    live_in,
    live_in_a_little,
    publish_version,
    put_foreign_blob,
    rows_of,
    write_old_backup,
)
from tests.support.children import child_argv, environment
from tests.support.command_line import succeed, tunesmith
from tests.support.databases import PostgresServer
from tests.support.factories import (
    add_base_model,
    add_dataset,
    make_base_directory,
    must_claim,
)
from tests.support.polling import wait_until
from tests.support.worker_jobs import JobBench
from worker.child import ChildProcess
from worker.runner import Runner
from worker.training import TrainStage


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'target' / 'tunesmith.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.empty_database() as url:
        yield url


@pytest.fixture
def target_store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "target")


@pytest.fixture
def lived_in(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> dict[str, str]:
    return live_in(database, store, settings, tmp_path)


@pytest.fixture
def lived_in_sqlite(sqlite_database: Database, store: LocalStore) -> None:
    live_in_a_little(sqlite_database, store)


def test_everything_comes_back_into_either_database(
    database: Database,
    store: LocalStore,
    lived_in: dict[str, str],
    target_url: str,
    target_store: LocalStore,
    tmp_path: Path,
) -> None:
    before = rows_of(database)
    root = backup(database, store, tmp_path / "backup")
    restored = restore_backup(root, target_url, target_store)
    assert restored.requeued == 1
    assert restored.models_elsewhere == {"tiny": str(tmp_path / "gone")}
    assert migrations.check(target_url) == []

    target = Database(target_url)
    try:
        after = rows_of(target)
        (job_before,), (job_after,) = before.pop("jobs"), after.pop("jobs")
        events = after.pop("job_events")
        assert events[:-1] == before.pop("job_events")
        assert (events[-1]["type"], events[-1]["data"]) == (
            "requeued",
            {"reason": "restored from a backup"},
        )
        assert after == before
        changed = {name for name in job_before if job_before[name] != job_after[name]}
        assert changed == {
            "status", "worker_id", "lease_expires_epoch", "stage", "last_event",
            "attempt_started_epoch",
        }  # fmt: skip
        assert (job_after["status"], job_after["lost_attempts"]) == ("queued", 0)

        with target.session() as session:
            assert auth.authenticate(session, lived_in["key"]).scopes
        assert {e.name for e in target_store.list_blobs()} == {e.name for e in store.list_blobs()}
        with target_store.open_blob(lived_in["checkpoint"]) as stream:
            assert stream.read() == b"state"
        assert target_store.has_adapter(lived_in["digest"])
        # What is added now does not collide with what came back.
        add_dataset(target, target_store)
        assert must_claim(target, "worker-2").attempt == job_before["attempt"] + 1
    finally:
        target.close()


@pytest.mark.postgres
def test_a_job_that_ran_during_the_backup_goes_on_elsewhere(
    tmp_path: Path, postgres_server: PostgresServer, target_store: LocalStore
) -> None:
    with postgres_server.empty_database() as target_url:
        _move_a_running_job(tmp_path, target_url, target_store)


def _move_a_running_job(tmp_path: Path, target_url: str, target_store: LocalStore) -> None:
    bench = JobBench(tmp_path / "data")
    try:
        job_id = bench.submit()
        bench.runner("train_in_steps")
        wait_until(lambda: bench.events(job_id, "checkpoint_saved"), 20, "no checkpoint")
        root = backup(bench.database, bench.store, tmp_path / "backup")
        assert bench.job(job_id).status == "running"
    finally:
        bench.close()

    assert restore_backup(root, target_url, target_store).requeued == 1
    settings = bench.settings.model_copy(update={"data_dir": tmp_path / "target"})
    database = Database(target_url)
    child = ChildProcess(
        child_argv("train_in_steps"), log_path=tmp_path / "log", environment=environment()
    )
    runner = Runner("train", TrainStage(settings, target_store), settings, database, child)
    runner.start()

    def job() -> Job:
        with database.session() as session:
            return session.scalars(select(Job)).one()

    try:
        wait_until(lambda: job().status == "succeeded", 30, lambda: f"{job().status}")
        with database.session() as session:
            events = jobs.events(session, LOCAL, job_id, limit=1000).data
            version = registry.get_version(session, LOCAL, job().adapter_name, 1)
        (resumed,) = [event.data for event in events if event.type == "resumed"]
        assert resumed["step"] >= 5
        assert target_store.has_adapter(version.digest)
        assert [event.id for event in events] == list(range(1, len(events) + 1))
        assert job().used_seconds < 30
    finally:
        runner.stop()
        assert runner.join(15)
        database.close()


def test_a_backup_moves_between_a_directory_and_a_bucket(
    sqlite_database: Database,
    store: LocalStore,
    settings: Settings,
    s3_url: str,
    tmp_path: Path,
) -> None:
    add_base_model(sqlite_database)
    dataset = add_dataset(sqlite_database, store)
    digest = publish_version(sqlite_database, store, tmp_path / "artifact")
    backup(sqlite_database, store, tmp_path / "first")
    elsewhere = Settings(data_dir=tmp_path / "elsewhere", artifact_url=s3_url)
    bucket, url = open_store(elsewhere), elsewhere.resolved_database_url
    restore_backup(tmp_path / "first", url, bucket)
    assert bucket.has_adapter(digest)

    moved = Database(url)
    try:
        assert backup(moved, bucket, tmp_path / "second")
    finally:
        moved.close()
    back = LocalStore(tmp_path / "back")
    restore_backup(tmp_path / "second", f"sqlite:///{tmp_path / 'back.db'}", back)
    assert back.publish_adapter(back.adapter_path(digest)).digest == digest
    with back.open_blob(dataset.sha256) as ours, store.open_blob(dataset.sha256) as theirs:
        assert ours.read() == theirs.read()
    with pytest.raises(Conflict) as caught:
        restore_backup(
            tmp_path / "second", f"sqlite:///{tmp_path / 'more.db'}", put_foreign_blob(bucket)
        )
    assert caught.value.code == "not_empty"


def test_a_database_or_store_in_use_is_not_restored_into(
    sqlite_database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    add_base_model(sqlite_database)
    dataset = add_dataset(sqlite_database, store)
    root = backup(sqlite_database, store, tmp_path / "backup")
    free_url = f"sqlite:///{tmp_path / 'free.db'}"
    for url, place in (
        (sqlite_database.url, LocalStore(tmp_path / "free")),
        (free_url, put_foreign_blob(LocalStore(tmp_path / "used"))),
    ):
        with pytest.raises(Conflict) as caught:
            restore_backup(root, url, place)
        assert caught.value.code == "not_empty"
    # What an interrupted restore has left is no obstacle.
    half = LocalStore(tmp_path / "half")
    with store.open_blob(dataset.sha256) as stream:
        half.write_blob([stream.read()], 10**6)
    restore_backup(root, free_url, half)


def test_a_schema_without_rows_is_moved_to_where_the_backup_is(
    sqlite_database: Database, store: LocalStore, lived_in_sqlite: None, tmp_path: Path
) -> None:
    root = backup(sqlite_database, store, tmp_path / "backup")
    url = f"sqlite:///{tmp_path / 'fresh.db'}"
    migrations.upgrade(url, "41ce9c9ad68a")
    restore_backup(root, url, LocalStore(tmp_path / "fresh"))
    assert migrations.current(url) == migrations.head()
    assert migrations.check(url) == []


def test_a_backup_of_an_older_schema_is_brought_up_to_date(
    tmp_path: Path, target_url: str, target_store: LocalStore
) -> None:
    root = tmp_path / "old"
    write_old_backup(root)
    restore_backup(root, target_url, target_store)
    assert migrations.check(target_url) == []
    database = Database(target_url)
    try:
        with database.session() as session:
            job = session.scalars(select(Job)).one()
            assert (job.status, job.queue_rank, job.validated) == ("queued", -7, True)
            assert {project.name for project in session.scalars(select(Project))} == {"default"}
    finally:
        database.close()


def test_a_backup_from_the_future_is_refused(
    sqlite_database: Database, store: LocalStore, tmp_path: Path
) -> None:
    create_backup(sqlite_database, store, "ffffffffffff", tmp_path / "backup")
    with pytest.raises(InvalidInput) as caught:
        restore_backup(tmp_path / "backup", f"sqlite:///{tmp_path / 'x.db'}", store)
    assert caught.value.code == "backup_too_new"
    assert not (tmp_path / "x.db").exists()


@pytest.mark.parametrize("damage", ["alter", "truncate", "remove", "no manifest", "escape"])
def test_a_damaged_backup_is_refused_before_anything_is_written(
    sqlite_database: Database, store: LocalStore, lived_in_sqlite: None, tmp_path: Path, damage: str
) -> None:
    root = backup(sqlite_database, store, tmp_path / "backup")
    victim = next((root / "blobs").iterdir())
    expected = "backup_damaged"
    match damage:
        case "alter":
            victim.write_bytes(b"x" + victim.read_bytes()[1:])
        case "truncate":
            victim.write_bytes(victim.read_bytes()[:-1])
        case "remove":
            victim.unlink()
        case "no manifest":
            (root / "manifest.json").unlink()
            expected = "no_backup"
        case "escape":
            manifest = json.loads((root / "manifest.json").read_text())
            manifest["files"][0]["path"] = "../../etc/passwd"
            (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput) as caught:
        restore_backup(root, f"sqlite:///{tmp_path / 'x.db'}", LocalStore(tmp_path / "x"))
    assert caught.value.code == expected
    assert not (tmp_path / "x.db").exists()
    assert not list((tmp_path / "x" / "blobs").iterdir())


def test_a_base_model_moves_with_its_own_files_only(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    for name, weights in (("copy", b"weights"), ("other", b"other weights")):
        directory = make_base_directory(tmp_path / name)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(weights)
    add_base_model(sqlite_database, digest=tree_digest(tmp_path / "copy"))
    at = ["--data-dir", settings.root]
    refused = tunesmith("models", "move", "tiny", tmp_path / "other", *at)
    assert refused.code == 1
    assert "other_model" in refused.stderr
    assert succeed("models", "show", "tiny", "--json", *at).json["path"] == "/nowhere"
    succeed("models", "move", "tiny", tmp_path / "copy", *at)
    shown = succeed("models", "show", "tiny", "--json", *at).json
    assert shown["path"] == str(tmp_path / "copy")
    assert tunesmith("models", "move", "unknown", tmp_path / "copy", *at).code == 1


class _Deleting:
    """A store from which something is deleted as soon as the rows are written."""

    def __init__(self, inner: LocalStore, act: Any) -> None:
        self._inner = inner
        self._act = act

    def __getattr__(self, name: str) -> Any:
        if self._act and name in {"open_blob", "open_adapter"}:
            act, self._act = self._act, None
            act()
        return getattr(self._inner, name)


def test_what_is_deleted_during_the_backup_is_deleted_in_the_restored_service(
    database: Database,
    store: LocalStore,
    lived_in: dict[str, str],
    target_url: str,
    target_store: LocalStore,
    tmp_path: Path,
) -> None:
    def delete_much() -> None:
        with database.session(write=True) as session:
            sha256 = datasets.delete(session, LOCAL, lived_in["dataset"])
            digest = registry.delete_version(session, LOCAL, "bot", 1, force=True)
            session.execute(text("DELETE FROM job_checkpoints"))
        for name in (sha256, lived_in["checkpoint"]):
            assert datasets.discard_blob(database, store, name)
        assert registry.discard_artifact(database, store, digest)

    manifest = create_backup(
        database, _Deleting(store, delete_much), migrations.head(), tmp_path / "backup"
    )
    assert (len(manifest.deleted), manifest.damaged) == (3, [])
    restore_backup(tmp_path / "backup", target_url, target_store)
    target = Database(target_url)
    try:
        restored, expected = rows_of(target), rows_of(database)
        for name in ("datasets", "job_checkpoints", "adapter_versions", "adapter_aliases"):
            assert restored[name] == expected[name], name
        assert [row["name"] for row in restored["adapters"]] == ["bot"]
    finally:
        target.close()


def test_a_row_of_every_table_is_in_the_fixture(
    database: Database, lived_in: dict[str, str]
) -> None:
    empty = {name for name, rows in rows_of(database).items() if not rows}
    assert empty <= {"usage_totals", "webhook_deliveries", "idempotency_keys"}
    with database.session() as session:
        assert session.scalars(select(JobCheckpoint)).one()

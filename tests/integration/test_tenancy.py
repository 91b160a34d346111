"""Another project's object cannot be told from a missing one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from core import datasets, jobs, registry
from core.auth import Principal
from core.config import Settings
from core.db.session import Database
from core.errors import InvalidInput, NotFound
from core.storage import LocalStore
from tests.support.factories import (
    add_base_model,
    add_dataset,
    add_project,
    make_spec,
    publish_artifact,
    submit,
)


def test_a_second_project_sees_nothing_of_the_first(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    add_base_model(database)
    owner, stranger = add_project(database, "owner"), add_project(database, "stranger")
    dataset = add_dataset(database, store, owner)
    job = submit(database, store, settings, owner, key="k", dataset=dataset.id)
    with database.session(write=True) as session:
        registry.import_adapter(
            session,
            owner,
            name="bot",
            published=publish_artifact(store, tmp_path / "artifact"),
            base_model="tiny",
            provenance={},
            store=store,
        )

    actions: dict[str, Callable[[Session, Principal], object]] = {
        "get job": lambda s, p: jobs.get(s, p, job.id),
        "cancel job": lambda s, p: jobs.cancel(s, p, job.id),
        "pause job": lambda s, p: jobs.pause(s, p, job.id),
        "resume job": lambda s, p: jobs.resume(s, p, job.id),
        "retry job": lambda s, p: jobs.retry(s, p, job.id, settings=settings),
        "set priority": lambda s, p: jobs.set_priority(s, p, job.id, 1),
        "checkpoints": lambda s, p: jobs.checkpoints(s, p, job.id),
        "delete job": lambda s, p: jobs.delete(s, p, job.id),
        "events": lambda s, p: jobs.events(s, p, job.id),
        "log": lambda s, p: jobs.read_log(s, p, job.id),
        "metrics": lambda s, p: jobs.metrics(s, p, job.id),
        "report": lambda s, p: jobs.report(s, p, job.id),
        "get data set": lambda s, p: datasets.get(s, p, dataset.id),
        "preview": lambda s, p: datasets.preview(s, p, store, dataset.id),
        "delete data set": lambda s, p: datasets.delete(s, p, dataset.id),
        "resolve": lambda s, p: registry.resolve(s, p, "bot"),
        "resolve version": lambda s, p: registry.resolve(s, p, "bot@1"),
        "get adapter": lambda s, p: registry.get_adapter(s, p, "bot"),
        "get version": lambda s, p: registry.get_version(s, p, "bot", 1),
        "list versions": lambda s, p: registry.list_versions(s, p, "bot"),
        "move alias": lambda s, p: registry.move_alias(s, p, "bot", "a", 1),
        "remove alias": lambda s, p: registry.remove_alias(s, p, "bot", "a"),
        "delete version": lambda s, p: registry.delete_version(s, p, "bot", 1, force=True),
        "delete adapter": lambda s, p: registry.delete_adapter(s, p, "bot", force=True),
    }
    for name, action in actions.items():
        with database.session(write=True) as session, pytest.raises(NotFound) as caught:
            action(session, stranger)
        with database.session(write=True) as session, pytest.raises(NotFound) as missing:
            action(session, add_nobody())
        assert (caught.value.code, str(caught.value)) == (
            missing.value.code,
            str(missing.value),
        ), name

    with database.session(write=True) as session:
        with pytest.raises(InvalidInput) as refused:
            jobs.submit(
                session,
                stranger,
                make_spec(dataset=dataset.id),
                settings=settings,
                store=store,
            )
        assert refused.value.code == "unknown_dataset"
        assert jobs.list_jobs(session, stranger).data == []
        assert datasets.list_datasets(session, stranger).data == []
        assert registry.list_adapters(session, stranger).data == []
        assert jobs.get(session, owner, job.id).status == "validating"
        assert registry.get_adapter(session, owner, "bot").latest == 1
    own = submit(database, store, settings, stranger, key="k")
    assert own.id != job.id, "idempotency keys are per project too"


def add_nobody() -> Principal:
    """Return a principal whose project holds nothing at all."""
    return Principal("project-nobody", frozenset())


def test_equal_bytes_of_two_projects_are_deleted_by_the_second(
    database: Database, store: LocalStore
) -> None:
    owner, stranger = add_project(database, "owner"), add_project(database, "stranger")
    first, second = add_dataset(database, store, owner), add_dataset(database, store, stranger)
    assert first.sha256 == second.sha256
    for principal, dataset, gone in ((owner, first, False), (stranger, second, True)):
        with database.session(write=True) as session:
            sha256 = datasets.delete(session, principal, dataset.id)
        assert datasets.discard_blob(database, store, sha256) is gone

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from core import registry
from core.auth import LOCAL, Principal
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound, Unavailable
from core.storage import LocalStore, PublishedAdapter
from tests.support.factories import BASE_DIGEST, add_project, publish_artifact


@pytest.fixture
def published(store: LocalStore, tmp_path: Path) -> PublishedAdapter:
    return publish_artifact(store, tmp_path / "artifact")


def _publish(
    database: Database,
    store: LocalStore,
    published: PublishedAdapter,
    name: str = "bot",
    principal: Principal = LOCAL,
) -> int:
    with database.session(write=True) as session:
        return registry.import_adapter(
            session,
            principal,
            name=name,
            published=published,
            base_model="tiny",
            provenance={"by": "test"},
            store=store,
        ).version


def test_references_name_the_latest_a_version_or_an_alias(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    for _ in range(2):
        _publish(database, store, published)
    with database.session(write=True) as session:
        registry.move_alias(session, LOCAL, "bot", "stable", 1)
        found = registry.resolve(session, LOCAL, "bot")
        assert (found.name, found.version, found.digest) == ("bot", 2, published.digest)
        assert (found.base_model, found.base_digest) == ("tiny", BASE_DIGEST)
        assert registry.resolve(session, LOCAL, "bot@1").version == 1
        assert registry.resolve(session, LOCAL, "bot:stable").version == 1
        for unknown in ("bot@3", "bot@999999999", "bot:beta", "bit"):
            with pytest.raises(NotFound) as missing:
                registry.resolve(session, LOCAL, unknown)
            assert missing.value.code == "unknown_adapter"
        for malformed in (
            "",
            "Bot",
            "bot@",
            "bot@x",
            "bot@1234567890",
            "bot:",
            "a b",
            "bot\n",
            "b\x00",
        ):
            with pytest.raises(InvalidInput) as caught:
                registry.resolve(session, LOCAL, malformed)
            assert caught.value.code == "invalid_adapter_reference"


def test_publishing_at_the_same_time_gives_consecutive_numbers(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    start = threading.Barrier(8)

    def publish(_: int) -> int:
        start.wait()
        return _publish(database, store, published)

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(publish, range(8)))
    assert sorted(numbers) == list(range(1, 9))
    with database.session() as session:
        adapter = registry.get_adapter(session, LOCAL, "bot")
    assert (adapter.latest, adapter.versions, adapter.aliases) == (8, 8, {"latest": 8})


def test_an_alias_rolls_back_and_is_removed(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    for _ in range(2):
        _publish(database, store, published)
    with database.session(write=True) as session:
        adapter = registry.move_alias(session, LOCAL, "bot", "latest", 1)
        assert (adapter.latest, adapter.base_model) == (1, "tiny")
        assert registry.move_alias(session, LOCAL, "bot", "a", 2).aliases == {"a": 2, "latest": 1}
        registry.remove_alias(session, LOCAL, "bot", "a")
        for alias, version, error in (
            ("A", 1, InvalidInput),
            ("b", 3, NotFound),
            ("b", 10**12, NotFound),
            ("b", -1, NotFound),
        ):
            with pytest.raises(error):
                registry.move_alias(session, LOCAL, "bot", alias, version)
        with pytest.raises(NotFound):
            registry.remove_alias(session, LOCAL, "bot", "a")
        with pytest.raises(Conflict):
            registry.remove_alias(session, LOCAL, "bot", "latest")


def test_a_version_that_an_alias_needs_is_deleted_by_force_only(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    for _ in range(3):
        _publish(database, store, published)
    with database.session(write=True) as session:
        registry.move_alias(session, LOCAL, "bot", "stable", 3)
        with pytest.raises(Conflict) as caught:
            registry.delete_version(session, LOCAL, "bot", 3)
        assert caught.value.code == "alias_points_here"
        assert registry.delete_version(session, LOCAL, "bot", 1) == published.digest
        registry.delete_version(session, LOCAL, "bot", 3, force=True)
        adapter = registry.get_adapter(session, LOCAL, "bot")
        assert adapter.aliases == {"latest": 2, "stable": 2}
        registry.delete_version(session, LOCAL, "bot", 2, force=True)
        adapter = registry.get_adapter(session, LOCAL, "bot")
        assert (adapter.aliases, adapter.versions, adapter.latest) == ({}, 0, None)
        with pytest.raises(NotFound):
            registry.delete_version(session, LOCAL, "bot", 2)
    assert _publish(database, store, published) == 4, "numbers are never given again"


def test_files_go_with_their_last_reference_in_any_project(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    other = add_project(database, "other")
    for principal in (LOCAL, other):
        _publish(database, store, published, principal=principal)
    with database.session(write=True) as session:
        with pytest.raises(Conflict):
            registry.delete_adapter(session, LOCAL, "bot")
        digests = registry.delete_adapter(session, LOCAL, "bot", force=True)
    assert digests == [published.digest]
    assert not registry.discard_artifact(database, store, published.digest)
    assert store.has_adapter(published.digest)
    with database.session(write=True) as session:
        with pytest.raises(NotFound):
            registry.get_adapter(session, LOCAL, "bot")
        registry.delete_adapter(session, other, "bot", force=True)
        assert registry.unreferenced_digest(session, published.digest)
    assert registry.discard_artifact(database, store, published.digest)
    assert not store.has_adapter(published.digest)


def test_a_version_never_outlives_its_files_when_equal_ones_are_deleted_meanwhile(
    database: Database, store: LocalStore, tmp_path: Path
) -> None:
    other = add_project(database, "other")
    artifact = tmp_path / "artifact"
    digest = publish_artifact(store, artifact).digest

    def publish(principal: Principal) -> None:
        while True:
            with suppress(Unavailable):
                _publish(database, store, store.publish_adapter(artifact), principal=principal)
                return

    def publish_and_delete() -> None:
        for _ in range(10):
            publish(other)
            with database.session(write=True) as session:
                registry.delete_adapter(session, other, "bot", force=True)
            registry.discard_artifact(database, store, digest)

    def publish_and_look() -> None:
        for _ in range(10):
            publish(LOCAL)
            assert store.has_adapter(digest)
            with database.session(write=True) as session:
                registry.delete_adapter(session, LOCAL, "bot", force=True)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(publish_and_delete), pool.submit(publish_and_look)]:
            done.result()


def test_lists_are_paged_newest_first(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    for name in ("a", "b", "c", "c", "c"):
        _publish(database, store, published, name)
    with database.session() as session:
        first = registry.list_adapters(session, LOCAL, limit=2)
        assert [(adapter.name, adapter.versions) for adapter in first.data] == [("c", 3), ("b", 1)]
        rest = registry.list_adapters(session, LOCAL, cursor=first.next_cursor, limit=2)
        assert [adapter.name for adapter in rest.data] == ["a"]
        assert rest.next_cursor is None
        versions = registry.list_versions(session, LOCAL, "c", limit=2)
        assert [(v.version, v.aliases) for v in versions.data] == [(3, ["latest"]), (2, [])]
        rest_versions = registry.list_versions(session, LOCAL, "c", cursor=versions.next_cursor)
        assert [version.version for version in rest_versions.data] == [1]
        with pytest.raises(InvalidInput):
            registry.list_versions(session, LOCAL, "c", cursor=first.next_cursor)


def test_a_bad_name_is_not_imported(
    database: Database, store: LocalStore, published: PublishedAdapter
) -> None:
    with pytest.raises(InvalidInput) as caught:
        _publish(database, store, published, "Bad Name")
    assert caught.value.code == "invalid_adapter_name"

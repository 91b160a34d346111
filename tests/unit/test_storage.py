from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from core.errors import InvalidInput, NotFound, TooLarge
from core.storage import LocalStore
from tests.unit.test_artifacts import build, write_artifact


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "data")


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "tmp").iterdir())


def test_a_blob_is_named_by_its_hash_and_read_back(store: LocalStore, tmp_path: Path) -> None:
    blob = store.write_blob([b"one", b"two"], max_bytes=6)
    assert (blob.sha256, blob.bytes) == (hashlib.sha256(b"onetwo").hexdigest(), 6)
    with store.open_blob(blob.sha256) as stream:
        assert stream.read() == b"onetwo"
    assert not leftovers(tmp_path)


def test_a_blob_over_the_limit_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        store.write_blob([b"x" * 5, b"x" * 5], max_bytes=9)
    assert not leftovers(tmp_path)
    assert not list((tmp_path / "data" / "blobs").iterdir())


def test_a_deleted_blob_is_gone_and_may_be_deleted_again(store: LocalStore) -> None:
    blob = store.write_blob([b"x"], max_bytes=1)
    store.delete_blob(blob.sha256)
    store.delete_blob(blob.sha256)
    with pytest.raises(NotFound):
        store.open_blob(blob.sha256)


def test_an_adapter_is_published_under_its_digest(store: LocalStore, tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "source")
    manifest = build(source)
    published = store.publish_adapter(source)
    assert published.digest == manifest.digest
    names = {path.name for path in store.adapter_path(manifest.digest).iterdir()}
    assert names == {file.path for file in manifest.files} | {"manifest.json"}
    assert not leftovers(tmp_path)


def test_many_publishers_of_one_adapter_agree(store: LocalStore, tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "source")
    manifest = build(source)
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            assert store.publish_adapter(source).digest == manifest.digest
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.has_adapter(manifest.digest)
    assert not leftovers(tmp_path)


def test_changed_files_are_not_published(store: LocalStore, tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "source")
    manifest = build(source)
    (source / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(InvalidInput) as caught:
        store.publish_adapter(source)
    assert caught.value.code == "digest_mismatch"
    assert not store.has_adapter(manifest.digest)


def test_a_deleted_adapter_is_gone_whole(store: LocalStore, tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "source")
    digest = store.publish_adapter(source).digest if build(source) else ""
    store.delete_adapter(digest)
    store.delete_adapter(digest)
    assert not store.has_adapter(digest)
    assert not leftovers(tmp_path)
    with pytest.raises(NotFound):
        store.adapter_path(digest)

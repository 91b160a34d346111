"""What every artifact store does, tried on a directory and on a real S3 server alike."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from core import artifacts
from core.config import Settings
from core.errors import InvalidInput, NotFound, TooLarge
from core.storage import ArtifactStore, bucket, open_store
from tests.unit.test_artifacts import build, write_artifact

ANY_BYTES = 10**9


@pytest.fixture(params=["directory", "shared directory", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of a machine, by the place where artifacts are kept."""
    url = ""
    if request.param == "shared directory":
        url = f"file://{tmp_path}/shared"
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
    return Settings(data_dir=tmp_path / "data", artifact_url=url)


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> ArtifactStore:
    """The same store, as another machine sees it."""
    if settings.artifact_url:
        settings = settings.model_copy(update={"data_dir": tmp_path / "other machine"})
    return open_store(settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_artifact(tmp_path / "source")
    build(directory)
    return directory


def names(objects: object) -> list[str]:
    return sorted(found.name for found in objects)  # type: ignore[attr-defined]


def run_together(*functions: Callable[[], object]) -> None:
    """Run functions at a time and raise what one of them raises."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_a_blob_is_named_by_its_hash_and_read_back_everywhere(
    store: ArtifactStore, elsewhere: ArtifactStore
) -> None:
    blob = store.write_blob([b"one", b"two"], max_bytes=6)
    assert (blob.sha256, blob.bytes) == (hashlib.sha256(b"onetwo").hexdigest(), 6)
    for reader in (store, elsewhere):
        assert reader.has_blob(blob.sha256)
        assert reader.blob_path(blob.sha256).read_bytes() == b"onetwo"
        with reader.open_blob(blob.sha256) as stream:
            assert stream.read() == b"onetwo"


def test_equal_blobs_are_stored_once(store: ArtifactStore, elsewhere: ArtifactStore) -> None:
    assert store.write_blob([b"ab"], ANY_BYTES) == elsewhere.write_blob([b"a", b"b"], ANY_BYTES)
    (found,) = store.list_blobs()
    assert (found.name, found.bytes) == (hashlib.sha256(b"ab").hexdigest(), 2)
    assert 0 <= found.age_seconds < 60


def test_an_empty_blob_is_a_blob(store: ArtifactStore, elsewhere: ArtifactStore) -> None:
    blob = store.write_blob([], max_bytes=0)
    assert elsewhere.blob_path(blob.sha256).read_bytes() == b""


def test_a_blob_of_many_parts_is_read_back(
    store: ArtifactStore, elsewhere: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_PART_BYTES", 5 * 1024**2)
    chunk = os.urandom(1024**2)
    blob = store.write_blob([chunk] * 11, ANY_BYTES)
    assert artifacts.sha256_file(elsewhere.blob_path(blob.sha256)) == blob.sha256
    assert not names(store.list_temporary())


def test_a_blob_over_the_limit_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        store.write_blob([b"x" * 5, b"x" * 5], max_bytes=9)
    assert not names(store.list_blobs())
    assert not names(store.list_temporary())
    assert not [path for path in tmp_path.rglob("*blob*-*") if path.is_file()]


def test_a_deleted_blob_is_gone_and_may_be_deleted_again(store: ArtifactStore) -> None:
    blob = store.write_blob([b"x"], max_bytes=1)
    store.delete_blob(blob.sha256)
    store.delete_blob(blob.sha256)
    assert not store.has_blob(blob.sha256)
    assert not names(store.list_blobs())
    for read in (store.open_blob, store.blob_path):
        with pytest.raises(NotFound) as caught:
            read(blob.sha256)
        assert caught.value.code == "blob_missing"


def test_an_adapter_is_published_whole_under_its_digest(
    store: ArtifactStore, elsewhere: ArtifactStore, source: Path
) -> None:
    manifest = artifacts.read_manifest(source)
    published = store.publish_adapter(source)
    assert (published.digest, published.manifest) == (manifest.digest, manifest)
    for reader in (store, elsewhere):
        assert reader.has_adapter(manifest.digest)
        copy = reader.adapter_path(manifest.digest)
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
            path.name: path.read_bytes() for path in source.iterdir()
        }
    (found,) = elsewhere.list_adapters()
    assert found.name == manifest.digest
    assert found.bytes >= published.bytes
    assert not names(store.list_temporary())


def test_an_adapters_files_are_read_without_a_copy(
    store: ArtifactStore, elsewhere: ArtifactStore, source: Path
) -> None:
    digest = store.publish_adapter(source).digest
    files = elsewhere.open_adapter(digest)
    assert list(files) == sorted(path.name for path in source.iterdir())
    for name, file in files.items():
        with file:
            assert file.seek(0, os.SEEK_END) == (source / name).stat().st_size
            file.seek(0)
            assert file.read() == (source / name).read_bytes()
    store.delete_adapter(digest)
    with pytest.raises(NotFound):
        elsewhere.open_adapter(digest)


def test_publishers_of_one_adapter_agree(
    store: ArtifactStore, elsewhere: ArtifactStore, source: Path
) -> None:
    digest = artifacts.read_manifest(source).digest
    run_together(*[lambda s=s: s.publish_adapter(source) for s in [store, elsewhere] * 4])
    assert names(store.list_adapters()) == [digest]
    assert not names(store.list_temporary())
    artifacts.verify_files(elsewhere.adapter_path(digest), artifacts.read_manifest(source))


def test_changed_files_are_not_published(store: ArtifactStore, source: Path) -> None:
    (source / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(InvalidInput) as caught:
        store.publish_adapter(source)
    assert caught.value.code == "digest_mismatch"
    assert not names(store.list_adapters())
    assert not names(store.list_temporary())


def test_a_deleted_adapter_is_gone_whole(store: ArtifactStore, source: Path) -> None:
    digest = store.publish_adapter(source).digest
    store.delete_adapter(digest)
    store.delete_adapter(digest)
    assert not store.has_adapter(digest)
    assert not names(store.list_adapters())
    assert not names(store.list_temporary())
    with pytest.raises(NotFound) as caught:
        store.adapter_path(digest)
    assert caught.value.code == "adapter_files_missing"


def test_a_deletion_beside_a_publication_leaves_all_or_nothing(
    store: ArtifactStore, elsewhere: ArtifactStore, source: Path
) -> None:
    digest = store.publish_adapter(source).digest
    for _ in range(3):
        run_together(
            lambda: store.delete_adapter(digest), lambda: elsewhere.publish_adapter(source)
        )
        if elsewhere.has_adapter(digest):
            for file in elsewhere.open_adapter(digest).values():
                with file:
                    file.read()
        assert not names(store.list_temporary())
    elsewhere.publish_adapter(source)
    assert store.has_adapter(digest)


def test_a_publisher_that_dies_half_way_leaves_nothing_to_see(
    settings: Settings, store: ArtifactStore, source: Path
) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from core import failpoints
from core.config import Settings
from core.storage import open_store

def die(instant, **_):
    assert instant == "artifact.upload"
    os.kill(os.getpid(), signal.SIGKILL)

failpoints.reached = die
open_store(Settings()).publish_adapter(Path(sys.argv[1]))
"""
    died = subprocess.run(
        [sys.executable, "-c", script, str(source)],
        env={**os.environ, **settings.environment()},
        check=False,
    )
    assert died.returncode == -9
    digest = artifacts.read_manifest(source).digest
    assert not store.has_adapter(digest)
    assert not names(store.list_adapters())
    with pytest.raises(NotFound):
        store.adapter_path(digest)
    (left,) = store.list_temporary()
    assert left.bytes > 0
    assert 0 <= left.age_seconds < 60

    # The next one is not hindered by it, and it can be cleared away beside what counts.
    store.publish_adapter(source)
    assert names(store.list_temporary()) == [left.name]
    store.delete_temporary(left.name)
    store.delete_temporary(left.name)
    assert not names(store.list_temporary())
    artifacts.verify_files(store.adapter_path(digest), artifacts.read_manifest(source))


def test_names_of_leftovers_reach_nothing_else(store: ArtifactStore, source: Path) -> None:
    digest = store.publish_adapter(source).digest
    for name in ("", ".", "..", "../blobs", f"../adapters/{digest}", f"adapters/{digest}/"):
        with pytest.raises(ValueError, match="names no leftover"):
            store.delete_temporary(name)
    assert store.has_adapter(digest)


def test_a_store_in_order_can_be_written(store: ArtifactStore) -> None:
    store.check_writable()
    assert not names(store.list_temporary())
    assert not names(store.list_blobs())

"""What is peculiar to a bucket: damage, races, networks, and copies that cost no request."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from core import artifacts, failpoints
from core.errors import Conflict, Unavailable
from core.storage import bucket as bucket_module
from core.storage.bucket import Bucket
from core.storage.cache import ArtifactCache
from core.storage.object_store import ObjectStore
from tests.support.object_store import ObjectStoreServer
from tests.unit.test_artifacts import build, write_artifact

ANY_BYTES = 10**9
SMALLEST_PART_BYTES = 5 * 1024**2


class CountingBucket(Bucket):
    """A bucket that notes the requests made of it."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(name, folder)
        self.calls: list[str] = []
        self.downloads: list[str] = []

    def download(self, name: str, target: Path) -> bool:
        self.downloads.append(name)
        return super().download(name, target)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self.calls.append(method)
        return super()._call(method, **arguments)


@pytest.fixture
def bucket(s3_url: str) -> CountingBucket:
    name, _, folder = s3_url.removeprefix("s3://").partition("/")
    return CountingBucket(name, folder)


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> ObjectStore:
    return ObjectStore(bucket, ArtifactCache(tmp_path / "cache", ANY_BYTES))


@pytest.fixture
def reader(bucket: Bucket, tmp_path: Path) -> ObjectStore:
    """The store as a machine without copies sees it."""
    return ObjectStore(bucket, ArtifactCache(tmp_path / "other cache", ANY_BYTES))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_artifact(tmp_path / "source")
    build(directory)
    return directory


def names(objects: object) -> list[str]:
    return sorted(found.name for found in objects)  # type: ignore[attr-defined]


# Damage.


@pytest.mark.parametrize("content", [b"", b"12", b"1234"])
def test_a_blob_of_other_bytes_is_refused_and_mended_by_the_next_writer(
    store: ObjectStore, reader: ObjectStore, bucket: Bucket, content: bytes
) -> None:
    blob = store.write_blob([b"123"], ANY_BYTES)
    bucket.put_bytes(f"blobs/{blob.sha256}", content)
    for _ in range(2):
        with pytest.raises(Conflict) as refused:
            reader.blob_path(blob.sha256)
        assert refused.value.code == "artifact_damaged"
    store.write_blob([b"123"], ANY_BYTES)
    assert reader.blob_path(blob.sha256).read_bytes() == b"123"


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_an_adapter_with_a_damaged_file_is_refused(
    store: ObjectStore, reader: ObjectStore, bucket: Bucket, source: Path, damage: str
) -> None:
    digest = store.publish_adapter(source).digest
    (weights,) = [
        found.name
        for found in bucket.list("adapters/")
        if found.name.endswith(artifacts.WEIGHTS_FILE)
    ]
    content = bucket.read(weights) or b""
    match damage:
        case "truncated":
            bucket.put_bytes(weights, content[:-1])
        case "changed":
            bucket.put_bytes(weights, content[:-1] + bytes([content[-1] ^ 1]))
        case "gone":
            bucket.delete(weights)
    with pytest.raises(Conflict) as refused:
        reader.adapter_path(digest)
    assert refused.value.code == "artifact_damaged"
    if damage != "changed":
        with pytest.raises(Conflict), reader.open_adapter(digest)[artifacts.WEIGHTS_FILE] as file:
            file.read()


@pytest.mark.parametrize("content", [b"", b"{", b'{"upload": "x"}', "another's"])
def test_a_damaged_manifest_is_refused_and_can_be_deleted(
    store: ObjectStore,
    reader: ObjectStore,
    bucket: Bucket,
    source: Path,
    tmp_path: Path,
    content: bytes | str,
) -> None:
    digest = store.publish_adapter(source).digest
    if isinstance(content, str):
        other = write_artifact(tmp_path / "other", r=2, lora_alpha=8)
        build(other)
        name = store.publish_adapter(other).digest
        content = bucket.read(f"adapters/{name}/manifest.json") or b""
    bucket.put_bytes(f"adapters/{digest}/manifest.json", content)
    for read in (reader.adapter_path, reader.open_adapter):
        with pytest.raises(Conflict) as refused:
            read(digest)
        assert refused.value.code == "artifact_damaged"
    store.delete_adapter(digest)
    assert not store.has_adapter(digest)
    (left,) = store.list_temporary()
    store.delete_temporary(left.name)
    assert not names(store.list_temporary())


# Races.


def test_of_two_complete_publishers_the_first_counts(
    store: ObjectStore,
    reader: ObjectStore,
    bucket: Bucket,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both have found no manifest and hold part of their files before either goes on.
    both = threading.Barrier(2)
    monkeypatch.setattr(failpoints, "reached", lambda instant: both.wait(30))
    threads = [
        threading.Thread(target=publisher.publish_adapter, args=(source,))
        for publisher in (store, reader)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    digest = artifacts.read_manifest(source).digest
    assert names(store.list_adapters()) == [digest]
    assert not names(store.list_temporary())
    found = [found.name for found in bucket.list("adapters/")]
    assert len(found) == len(list(source.iterdir()))
    artifacts.verify_files(reader.adapter_path(digest), artifacts.read_manifest(source))


def test_a_publisher_whose_answer_got_lost_keeps_its_files(
    bucket: Bucket, reader: ObjectStore, source: Path, tmp_path: Path
) -> None:
    class Forgetful(Bucket):
        def create_bytes(self, name: str, content: bytes) -> bool:
            super().create_bytes(name, content)
            return super().create_bytes(name, content)

    forgetful = Forgetful(bucket._name, bucket._prefix)
    store = ObjectStore(forgetful, ArtifactCache(tmp_path / "third cache", ANY_BYTES))
    digest = store.publish_adapter(source).digest
    artifacts.verify_files(reader.adapter_path(digest), artifacts.read_manifest(source))


def test_a_leftover_that_has_come_to_count_is_not_removed(
    store: ObjectStore, reader: ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(failpoints, "reached", lambda _: seen.extend(names(store.list_temporary())))
    digest = store.publish_adapter(source).digest
    (name,) = seen
    store.delete_temporary(name)
    artifacts.verify_files(reader.adapter_path(digest), artifacts.read_manifest(source))


def test_an_unfinished_upload_in_parts_is_a_leftover(store: ObjectStore, bucket: Bucket) -> None:
    bucket._call("create_multipart_upload", Key=f"{bucket._prefix}blobs/half")
    (left,) = store.list_temporary()
    assert left.age_seconds < 60
    store.delete_temporary(left.name)
    store.delete_temporary(left.name)
    assert not names(store.list_temporary())


def test_a_large_blob_is_written_once_by_two_writers(
    store: ObjectStore, reader: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both find nothing and upload all parts; the second one's are dropped at the end.
    monkeypatch.setattr(Bucket, "find", lambda self, name: None)
    monkeypatch.setattr(bucket_module, "_PART_BYTES", SMALLEST_PART_BYTES)
    chunks = [bytes([n]) * 1024**2 for n in range(11)]
    blob = store.write_blob(chunks, ANY_BYTES)
    assert reader.write_blob(chunks, ANY_BYTES) == blob
    assert names(store.list_blobs()) == [blob.sha256]
    assert not names(store.list_temporary())


# Copies.


def test_to_ask_for_an_object_takes_one_request(
    store: ObjectStore, bucket: CountingBucket, source: Path
) -> None:
    digest = store.publish_adapter(source).digest
    blob = store.write_blob([b"x"], ANY_BYTES)
    for ask, name in [(store.has_adapter, digest), (store.has_blob, blob.sha256)]:
        for expected in (True, False):
            bucket.calls.clear()
            assert ask(name if expected else "0" * 64) is expected
            assert bucket.calls == ["head_object"]


def test_many_callers_share_one_download_and_the_copy_costs_no_request(
    store: ObjectStore, reader: ObjectStore, bucket: CountingBucket, source: Path
) -> None:
    digest = store.publish_adapter(source).digest
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(reader.adapter_path(digest))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 8
    assert len(bucket.downloads) == len(artifacts.read_manifest(source).files)

    bucket.calls.clear()
    assert reader.adapter_path(digest) == paths[0]
    blob = store.write_blob([b"x"], ANY_BYTES)
    bucket.calls.clear()
    assert store.blob_path(blob.sha256).read_bytes() == b"x"
    assert not bucket.calls, "what was written here is here"


@pytest.mark.parametrize("damage", ["truncated", "lost"])
def test_a_damaged_copy_is_fetched_again(
    store: ObjectStore, reader: ObjectStore, source: Path, damage: str
) -> None:
    manifest = artifacts.read_manifest(source)
    digest = store.publish_adapter(source).digest
    blob = store.write_blob([b"12345"], ANY_BYTES)
    for file in (
        reader.adapter_path(digest) / artifacts.WEIGHTS_FILE,
        reader.blob_path(blob.sha256),
    ):
        if damage == "lost":
            file.unlink()
        else:
            with file.open("r+b") as stream:
                stream.truncate(2)
    artifacts.verify_files(reader.adapter_path(digest), manifest)
    assert reader.blob_path(blob.sha256).read_bytes() == b"12345"


# Trouble.


def test_a_store_that_ignores_conditions_is_refused(
    bucket: Bucket, reader: ObjectStore, tmp_path: Path
) -> None:
    class Simple(Bucket):
        def create_bytes(self, name: str, content: bytes) -> bool:
            self.put_bytes(name, content)
            return True

    simple = ObjectStore(
        Simple(bucket._name, bucket._prefix), ArtifactCache(tmp_path / "c", ANY_BYTES)
    )
    with pytest.raises(Unavailable) as caught:
        simple.check_writable()
    assert "If-None-Match" in (caught.value.hint or "")
    reader.check_writable()


def refused_by(store: ObjectStore) -> list[Unavailable]:
    """Return what each kind of call raises when nothing can be reached."""
    found = []
    for call in (
        lambda: store.write_blob([b"x"], ANY_BYTES),
        lambda: store.blob_path("0" * 64),
        lambda: store.has_blob("0" * 64),
        lambda: store.delete_blob("0" * 64),
        lambda: store.adapter_path("0" * 64),
        lambda: store.open_adapter("0" * 64),
        lambda: store.has_adapter("0" * 64),
        lambda: store.delete_adapter("0" * 64),
        lambda: list(store.list_blobs()),
        lambda: list(store.list_adapters()),
        lambda: list(store.list_temporary()),
        store.check_writable,
    ):
        with pytest.raises(Unavailable) as caught:
            call()
        found.append(caught.value)
    return found


def test_an_unreachable_store_is_unavailable(
    s3_url: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_CLIENT_TRIES", 1)
    monkeypatch.setattr(bucket_module, "_BODY_TRIES", 1)
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = ObjectStore(Bucket("tunesmith", "x"), ArtifactCache(tmp_path / "empty", ANY_BYTES))
    for error in refused_by(store):
        assert error.code == "artifact_store_unavailable"
        assert error.retryable
        assert error.hint
    with pytest.raises(Unavailable):
        store.publish_adapter(source)
    assert not list((tmp_path / "empty" / "tmp").iterdir())


def test_an_endpoint_that_is_no_url_is_unavailable(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio 9000")
    store = ObjectStore(Bucket("tunesmith", "x"), ArtifactCache(tmp_path / "c", ANY_BYTES))
    with pytest.raises(Unavailable) as caught:
        store.check_writable()
    assert "AWS_ENDPOINT_URL" in (caught.value.hint or "")


def test_a_store_that_does_not_answer_is_given_up(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_READ_SECONDS", 0.1)
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = ObjectStore(Bucket("tunesmith", "x"), ArtifactCache(tmp_path / "c", ANY_BYTES))
        with pytest.raises(Unavailable) as caught:
            store.has_blob("0" * 64)
    assert caught.value.code == "artifact_store_unavailable"


def test_a_missing_bucket_and_missing_credentials_are_told(
    s3_server: ObjectStoreServer, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArtifactCache(tmp_path / "cache", ANY_BYTES)
    with pytest.raises(Unavailable, match="NoSuchBucket") as caught:
        ObjectStore(Bucket("no-such-bucket", ""), cache).check_writable()
    assert "bucket exists" in (caught.value.hint or "")
    for read in ("blob_path", "adapter_path"):
        # Not the same as artifacts that are gone, for good.
        with pytest.raises(Unavailable, match="NoSuchBucket"):
            getattr(ObjectStore(Bucket("no-such-bucket", ""), cache), read)("0" * 64)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(Unavailable, match="Credential") as caught:
        ObjectStore(Bucket("tunesmith", ""), cache).check_writable()
    assert "credentials" in (caught.value.hint or "")

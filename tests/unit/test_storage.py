from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.config import Settings
from core.errors import InvalidInput, Unavailable
from core.storage import LocalStore, open_store
from core.storage.disk import disk_errors
from core.storage.object_store import ObjectStore
from tests.unit.test_artifacts import build, write_artifact


def open_url(tmp_path: Path, url: str) -> object:
    return open_store(Settings(data_dir=tmp_path / "data", artifact_url=url))


def test_artifacts_are_in_the_data_directory_unless_a_url_says_otherwise(tmp_path: Path) -> None:
    for url, root in [("", tmp_path / "data"), (f"file://{tmp_path}/a%20b", tmp_path / "a b")]:
        store = open_url(tmp_path, url)
        assert isinstance(store, LocalStore)
        blob = store.write_blob([b"x"], max_bytes=1)
        assert (root / "blobs" / blob.sha256).is_file()
        # Uploads are unpacked there in any case.
        assert (tmp_path / "data" / "tmp").is_dir()
    for url in ("s3://bucket", "s3://bucket/", "s3://my.bucket/some/folder"):
        assert isinstance(open_url(tmp_path, url), ObjectStore)


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/x", "S4://bucket", "/a/path", "a/path", "file://host/path", "file:relative",
        "s3:///prefix", "s3://", "s3://UPPER", "s3://user@bucket/x", "s3://bucket/x?versionId=1",
        "http://127.0.0.1:9000/bucket",
    ],
)  # fmt: skip
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_url(tmp_path, url)
    assert caught.value.code == "unknown_artifact_url"
    assert caught.value.hint


def test_a_process_without_a_bucket_loads_no_client_of_one() -> None:
    script = (
        "import sys, service.app, worker.app\n"
        "from core.storage import open_store\n"
        "from core.config import Settings\n"
        "print({'s3fs', 'fsspec', 'botocore', 'aiobotocore'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "storage_full"),
        (errno.EDQUOT, "storage_full"),
        (errno.ESTALE, "artifact_store_unavailable"),
        (errno.EROFS, "artifact_store_unavailable"),
    ],
)
def test_a_disk_that_refuses_is_named(number: int, code: str) -> None:
    with pytest.raises(Unavailable) as caught, disk_errors():
        raise OSError(number, os.strerror(number))
    assert caught.value.code == code
    assert errno.errorcode[number] in caught.value.message
    with pytest.raises(IsADirectoryError), disk_errors():
        raise IsADirectoryError(errno.EISDIR, "passes")


def test_age_counts_from_the_last_time_that_something_was_stored(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "data")
    source = write_artifact(tmp_path / "source")
    build(source)
    sha256 = store.write_blob([b"x"], 1).sha256
    digest = store.publish_adapter(source).digest
    then = time.time() - 1000
    for path in (store.blob_path(sha256), store.adapter_path(digest)):
        for found in (path, *path.glob("*")):
            os.utime(found, (then, then))
    for listing in (store.list_blobs, store.list_adapters):
        (found,) = listing()
        assert 990 < found.age_seconds < 1100
    store.write_blob([b"x"], 1)
    store.publish_adapter(source)
    for listing in (store.list_blobs, store.list_adapters):
        (found,) = listing()
        assert found.age_seconds < 100


def test_a_leftover_is_as_old_as_the_newest_in_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "data")
    left = tmp_path / "data" / "tmp" / "adapter-x"
    left.mkdir()
    (left / "weights").write_bytes(b"123")
    os.utime(left, (0, 0))
    (found,) = store.list_temporary()
    assert (found.name, found.bytes) == ("adapter-x", 3)
    assert found.age_seconds < 100

"""One folder of an S3 bucket, through s3fs: conditional writes, listings, and errors of ours.

Owns what a request may cost: seconds until it is given up, tries, parts in memory. Endpoint and
credentials come from the AWS variables and files, as botocore reads them. Knows no artifacts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from core.errors import Unavailable
from core.logging import get_logger
from core.storage.disk import disk_errors

_CONNECT_SECONDS = 3.0
_READ_SECONDS = 20.0
# The client tries a request twice by itself; s3fs does so with a body that broke off.
_CLIENT_TRIES = 2
_BODY_TRIES = 2
_CONFLICT_TRIES = 5

_CONNECTIONS = 32
_PART_BYTES = 16 * 1024**2
_PARTS_AT_ONCE = 4
_MAX_PARTS = 10_000

_ABSENT = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict"}

log = get_logger(__name__)


@dataclass(frozen=True)
class BucketObject:
    """An object, or an unfinished upload of one; its name is relative to the folder."""

    name: str
    bytes: int
    age_seconds: float


class Bucket:
    """A folder of a bucket; nothing is connected to before the first request.

    Every method raises `Unavailable` with code `artifact_store_unavailable` when the store cannot
    be reached or refuses.

    Args:
        name: The bucket.
        folder: Where in it; may be empty.
    """

    def __init__(self, name: str, folder: str) -> None:
        self._name = name
        self._prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        self._connecting = threading.Lock()
        self._connection: Any = None

    def create_file(self, name: str, source: Path) -> bool:
        """Upload a file unless there is such an object; return whether there was none."""
        return self._create(lambda: self._put_file(name, source, mode="create"))

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Store bytes unless there is such an object; return whether there was none."""
        target = self._path(name)
        return self._create(lambda: self._filesystem.pipe_file(target, content, mode="create"))

    def put_file(self, name: str, source: Path) -> None:
        """Upload a file, in the place of an object of that name if there is one."""
        with disk_errors(), _store_errors():
            self._put_file(name, source, mode="overwrite")

    def put_bytes(self, name: str, content: bytes) -> None:
        """Store bytes, in the place of an object of that name if there is one."""
        with _store_errors():
            self._filesystem.pipe_file(self._path(name), content)

    def find(self, name: str) -> BucketObject | None:
        """Return what is known of an object, with a single request."""
        with _store_errors():
            try:
                found = self._call("head_object", Key=self._prefix + name)
            except FileNotFoundError:
                return None
        age = _age_seconds(found["LastModified"], found)
        return BucketObject(name, int(found["ContentLength"]), age)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return an object's bytes, all or those before `end`; `None` if there is no object."""
        with _store_errors():
            try:
                content: bytes = self._filesystem.cat_file(
                    self._path(name), start=start, end=end, max_concurrency=1
                )
            except FileNotFoundError as error:
                if not _is_of_object(error):
                    raise
                return None
        return content

    def download(self, name: str, target: Path) -> bool:
        """Write an object to a new file; return whether there is such an object."""
        with disk_errors(), _store_errors():
            try:
                self._filesystem.get_file(
                    self._path(name),
                    str(target),
                    chunksize=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
            except FileNotFoundError as error:
                if not _is_of_object(error):
                    raise
                return False
        return True

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        with _store_errors():
            self._call("delete_object", Key=self._prefix + name)

    def list(self, start: str) -> Iterator[BucketObject]:
        """Yield all objects whose names start like this, in the order of their names."""
        page: dict[str, Any] = {}
        while True:
            with _store_errors():
                found = self._call("list_objects_v2", Prefix=self._prefix + start, **page)
            for entry in found.get("Contents", []):
                name = entry["Key"].removeprefix(self._prefix)
                age = _age_seconds(entry["LastModified"], found)
                yield BucketObject(name, int(entry["Size"]), age)
            if not found.get("IsTruncated"):
                return
            page = {"ContinuationToken": found["NextContinuationToken"]}

    def list_uploads(self, start: str) -> Iterator[tuple[BucketObject, str]]:
        """Yield unfinished uploads in parts, each with its id; their parts take up space."""
        page: dict[str, Any] = {}
        while True:
            with _store_errors():
                found = self._call("list_multipart_uploads", Prefix=self._prefix + start, **page)
            for entry in found.get("Uploads", []):
                name = entry["Key"].removeprefix(self._prefix)
                age = _age_seconds(entry["Initiated"], found)
                yield BucketObject(name, 0, age), entry["UploadId"]
            if not found.get("IsTruncated"):
                return
            page = {
                "KeyMarker": found["NextKeyMarker"],
                "UploadIdMarker": found["NextUploadIdMarker"],
            }

    def abort_upload(self, name: str, upload_id: str) -> None:
        """Forget an unfinished upload; one that is gone is no error."""
        with _store_errors():
            try:
                self._call("abort_multipart_upload", Key=self._prefix + name, UploadId=upload_id)
            except FileNotFoundError as error:
                if not _is_of_object(error):
                    raise

    def _create(self, put: Callable[[], object]) -> bool:
        for remaining in reversed(range(_CONFLICT_TRIES)):
            with disk_errors(), _store_errors():
                try:
                    put()
                    return True
                except FileExistsError:
                    return False
                except OSError as error:
                    if _code(error) in _ABSENT:
                        return False
                    # Somebody else writes this object at this moment; see who is first.
                    if _code(error) not in _CONFLICT or not remaining:
                        raise
        raise AssertionError("the last try returns or raises")

    def _put_file(self, name: str, source: Path, *, mode: str) -> None:
        size = source.stat().st_size
        self._filesystem.put_file(
            str(source),
            self._path(name),
            mode=mode,
            chunksize=max(_PART_BYTES, math.ceil(size / _MAX_PARTS)),
            max_concurrency=_PARTS_AT_ONCE,
        )

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._filesystem.call_s3(method, Bucket=self._name, **arguments)
        return answer

    def _path(self, name: str) -> str:
        return f"{self._name}/{self._prefix}{name}"

    @property
    def _filesystem(self) -> Any:
        with self._connecting:
            if self._connection is None:
                self._connection = _connect()
            return self._connection


def _connect() -> Any:
    # Imported with the first request: it takes a third of a second, which only S3's users pay.
    from s3fs import S3FileSystem

    filesystem = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"mode": "standard", "total_max_attempts": _CLIENT_TRIES},
        },
    )
    filesystem.retries = _BODY_TRIES
    return filesystem


def _age_seconds(then: datetime, answer: dict[str, Any]) -> float:
    """Return the age by the clock of the store, which wrote the time, where it tells its own."""
    stated = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    now = parsedate_to_datetime(stated) if stated else datetime.now(UTC)
    return max(0.0, (now - then).total_seconds())


def _code(error: BaseException) -> str:
    """Return the store's own code of an error that s3fs has translated."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is_of_object(error: FileNotFoundError) -> bool:
    """Tell whether an object is missing, rather than the bucket or a file of this machine."""
    return _code(error) not in ("NoSuchBucket", "")


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn what botocore and the network raise into `Unavailable`; errors of the disk pass."""
    from aiohttp import ClientError as TransportError
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise _refused(error) from error
        raise
    # A value error: the endpoint is no URL.
    except (TransportError, BotoCoreError, ConnectionError, TimeoutError, ValueError) as error:
        # Told in full to the operator alone, as it names machines.
        log.warning("artifact_store_unavailable", error=repr(error))
        raise Unavailable(
            f"the artifact store does not answer ({type(error).__name__})",
            code="artifact_store_unavailable",
            retry_after_seconds=5,
            hint="Check AWS_ENDPOINT_URL, the credentials and the network.",
        ) from error
    except OSError as error:
        if _code(error):
            raise _refused(error) from error
        raise


def _refused(error: OSError) -> Unavailable:
    return Unavailable(
        f"the artifact store refuses the request ({_code(error)})",
        code="artifact_store_unavailable",
        retry_after_seconds=5,
        hint="Check that the bucket exists and that the credentials may read, write, list and "
        "delete in it.",
    )

"""A real S3-compatible server for tests: moto's, in a process of its own on a loopback port.

with running_s3() as (artifact_url, environment):
    ...  # start processes with `environment` and TUNESMITH_ARTIFACT_URL=artifact_url
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from core.ids import new_id

_BUCKET = "tunesmith"
# When every upload in parts began, according to moto; clients would take them for forgotten ones.
_MOTOS_TIME = b"2010-11-10T20:48:33.000Z"


class ObjectStoreServer(NamedTuple):
    """A running server with an empty bucket.

    Attributes:
        artifact_url: `s3://BUCKET/PREFIX`; add a folder for a store of one's own.
        environment: `AWS_*` variables by which a client finds the server.
    """

    artifact_url: str
    environment: dict[str, str]

    def new_url(self) -> str:
        """Return the URL of an empty store on this server."""
        return f"{self.artifact_url}/{new_id('store')}"


@contextmanager
def running_s3() -> Iterator[ObjectStoreServer]:
    """Run a server on a free loopback port until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.object_store"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "the S3 server did not start"
        yield ObjectStoreServer(f"s3://{_BUCKET}/tests", s3_environment(int(port)))
    finally:
        process.kill()
        process.communicate()


def s3_environment(port: int) -> dict[str, str]:
    """Return the variables of a client of a server on this loopback port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _serve() -> None:
    """Serve until stdin closes, so that the server never outlives its test run."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = _one_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _make_bucket(server.port)
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


def _one_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Make conditional writes atomic, as they are at S3; moto looks first and writes then."""
    lock = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # Received before the lock is taken: a client that stalls holds nobody else up.
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with lock:
            answer = application({**environ, "wsgi.input": io.BytesIO(body)}, start_response)
        # Of the same length, so that the headers stay right.
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z").encode()
        return [piece.replace(_MOTOS_TIME, now) for piece in answer]

    return serve


def _make_bucket(port: int) -> None:
    import urllib.request

    request = urllib.request.Request(f"http://127.0.0.1:{port}/{_BUCKET}", method="PUT")
    urllib.request.urlopen(request).close()


if __name__ == "__main__":
    _serve()

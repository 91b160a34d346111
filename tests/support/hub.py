"""A small Hugging Face Hub on loopback: the few answers that fetching a data set needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@contextmanager
def serve_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve one data set with revision `main`; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api = f"/api/datasets/{repository}"
            for revision in ("main", COMMIT):
                if path in (f"{api}/revision/{revision}", api):
                    listed = [{"rfilename": name} for name in files]
                    return self._json({"id": repository, "sha": COMMIT, "siblings": listed})
                if path.startswith(f"{api}/tree/{revision}"):
                    folder = path.removeprefix(f"{api}/tree/{revision}").strip("/")
                    return self._tree(folder)
                if path == f"{api}/paths-info/{revision}":
                    return self._tree("")
                prefix = f"/datasets/{repository}/resolve/{revision}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    return self._file(files[path.removeprefix(prefix)])
            found = path.startswith((api, f"/datasets/{repository}/"))
            code = "EntryNotFound" if found and "/resolve/" in path else "RevisionNotFound"
            return self._send(404, b"{}", {"X-Error-Code": code if found else "RepoNotFound"})

        def _tree(self, folder: str) -> None:
            if folder:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                    for name, data in files.items()
                ]
            )

        def _file(self, data: bytes) -> None:
            self._send(200, data, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()

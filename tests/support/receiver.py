"""A program that is sent webhooks, on a loopback port: it keeps what came and answers as told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from standardwebhooks import Webhook

from tests.support.polling import wait_until

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verify(self, secret: str) -> dict[str, Any]:
        """Return the message, checked as a receiver does."""
        return cast(dict[str, Any], Webhook(secret).verify(self.body, self.headers))


@dataclass
class Receiver:
    """What came so far, and how to answer next."""

    port: int = 0
    scheme: str = "http"
    received: list[Received] = field(default_factory=list)
    answer: Answer = field(default_factory=lambda: status(204))

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook"

    def wait_for(self, count: int) -> list[Received]:
        """Return what came once there are `count` requests."""
        wait_until(lambda: len(self.received) >= count, 10, lambda: f"came: {self.received}")
        return self.received


def status(code: int, **headers: str) -> Answer:
    """Answer with a status and no body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def drip(head: bytes, piece: bytes, gone: threading.Event) -> Answer:
    """Send `head` and then a piece every tenth of a second, until the sender goes away.

    A sender that is still there after some seconds has failed the test, and is let go.
    """

    def answer(handler: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            handler.wfile.write(head)
            for _ in range(40):
                if gone.wait(0.1):
                    break
                handler.wfile.write(piece)
            else:
                return
        gone.set()

    return answer


@contextmanager
def receiver(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Run a receiver on a port of its own.

    Args:
        host: A loopback address.
        tls: With the receiver's certificate; plain HTTP without.
    """
    state = Receiver(scheme="https" if tls else "http")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            state.received.append(Received(self.path, headers, self.rfile.read(length)))
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            # Senders that hang up, and handshakes that they refuse, are what the tests want.
            pass

        def finish_request(self, request: Any, client_address: Any) -> None:
            if tls is not None:
                request = tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
            if tls is not None:
                request.close()

    with Server((host, 0), Handler) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join(10)

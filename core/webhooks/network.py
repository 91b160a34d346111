"""Where a message may go and how long that may take, below HTTP: names, connections, deadlines."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import httpcore2

from core.webhooks.addresses import is_allowed

Resolver = Callable[[str, int], Sequence[str]]
"""From a host and a port to the IP addresses of that host."""

_MAX_ADDRESSES = 4


def resolve(host: str, port: int) -> Sequence[str]:
    """Return all IP addresses of a host, in the system's order.

    Raises:
        OSError: The name does not resolve.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class AddressRefused(Exception):
    """A name leads to where the service does not connect to."""


class Deadline:
    """The end of an exchange; what is left bounds every single wait."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            httpcore2.TimeoutException: None are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the exchange took too long")
        return left


class CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to addresses that passed the check, and to nothing that a second look-up may say.

    Only the connection is made here: the host of the URL stays what TLS and the `Host` header name.
    """

    def __init__(
        self,
        network: httpcore2.NetworkBackend,
        resolver: Resolver,
        allow_private: bool,
        deadline: Deadline,
    ) -> None:
        self._network = network
        self._resolver = resolver
        self._allow_private = allow_private
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address of a host that answers, if all of them may be called.

        Raises:
            AddressRefused: One of them may not.
        """
        addresses = _within(self._deadline, self._resolver, host, port)
        if not addresses:
            raise httpcore2.ConnectError("the host has no address")
        # One bad address refuses all: which of them is tried would otherwise be the name owner's
        # choice.
        if not all(is_allowed(each, allow_private=self._allow_private) for each in addresses):
            raise AddressRefused
        tried = addresses[:_MAX_ADDRESSES]
        for position, address in enumerate(tried, start=1):
            try:
                stream = self._network.connect_tcp(
                    address,
                    port,
                    timeout=self._deadline.left() / (len(tried) - position + 1),
                    socket_options=socket_options,
                )
                return _TimedStream(stream, self._deadline)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if position == len(tried):
                    raise
        raise AssertionError("unreachable")


def _within(deadline: Deadline, resolver: Resolver, host: str, port: int) -> Sequence[str]:
    """Resolve a name; the system's own patience with name servers is longer than ours.

    Raises:
        httpcore2.TimeoutException: It took too long; the look-up ends by itself some time later.
    """
    outcome: Future[Sequence[str]] = Future()

    def look_up() -> None:
        try:
            outcome.set_result(resolver(host, port))
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=look_up, name="webhook-resolver", daemon=True).start()
    try:
        return outcome.result(deadline.left())
    except TimeoutError as error:
        if outcome.done():
            raise
        raise httpcore2.ConnectTimeout("the name was not resolved in time") from error


class _TimedStream(httpcore2.NetworkStream):
    """A stream that bounds the sum of all waits; by themselves they start anew with every byte."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left())
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

"""Sends one message: resolves the name, checks every address, connects to what was checked.

Follows no redirect, uses no proxy, keeps no connection and no part of an answer but its status:
what a receiver says cannot be read through this service.
"""

from __future__ import annotations

import functools
import json
import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpcore2
from standardwebhooks import Webhook

from core.errors import InvalidInput
from core.webhooks.addresses import check_url
from core.webhooks.network import AddressRefused, CheckedNetwork, Deadline, Resolver, resolve

_MAX_ANSWER_BYTES = 4096
_MAX_ERROR = 300
_HEADERS: dict[bytes | str, bytes | str] = {
    "Content-Type": "application/json",
    "User-Agent": "Tunesmith-Webhooks/1",
    "Accept": "*/*",
    "Connection": "close",
}


@dataclass(frozen=True)
class Message:
    """What is sent.

    Attributes:
        id: The same however often it is sent.
        url: Where to.
        secrets: Each signs; a receiver needs to know one of them.
        payload: The body, as JSON values.
    """

    id: str
    url: str
    secrets: tuple[str, ...]
    payload: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """How an attempt ended.

    Attributes:
        status: The HTTP status, if one came.
        error: Why it counts as failed; `None` when it was delivered.
        retry_after_seconds: What the receiver asks for.
    """

    status: int | None = None
    error: str | None = None
    retry_after_seconds: float = 0.0


class Sender:
    """Sends messages; may be used by several threads.

    Args:
        timeout_seconds: For a whole exchange, from resolving to the last byte read.
        allow_private: Also send to private and loopback addresses, and over http.
        resolver: Names to addresses.
        tls: What certificates are checked with; the system's authorities by default.
        network: What connects.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float,
        allow_private: bool,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
        network: httpcore2.NetworkBackend | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._allow_private = allow_private
        self._resolver = resolver
        self._tls = tls or _system_authorities()
        self._network = network or httpcore2.SyncBackend()

    def send(self, message: Message) -> Answer:
        """Make one attempt; every failure is an answer."""
        try:
            return self._post(message)
        except InvalidInput as error:
            return Answer(error=error.message)
        except AddressRefused:
            return Answer(error="the host resolves to an address that the service does not call")
        except httpcore2.TimeoutException:
            return Answer(error=f"no answer within {self._timeout_seconds:g} seconds")
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError, ValueError) as error:
            return Answer(error=f"{_kind(error)}: {error}"[:_MAX_ERROR])

    def _post(self, message: Message) -> Answer:
        url = check_url(message.url, allow_private=self._allow_private)
        body = json.dumps(message.payload, separators=(",", ":"))
        headers = {**_HEADERS, b"Host": url.netloc, **_signature(message, body)}
        target = httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        checked = CheckedNetwork(
            self._network, self._resolver, self._allow_private, Deadline(self._timeout_seconds)
        )
        with (
            httpcore2.ConnectionPool(ssl_context=self._tls, network_backend=checked) as pool,
            pool.stream("POST", target, headers=headers, content=body.encode("ascii")) as response,
        ):
            _read_some(response)
            return _judge(response)


@functools.cache
def _system_authorities() -> ssl.SSLContext:
    """Return the context of the system's authorities, or of those that `SSL_CERT_FILE` names."""
    return httpcore2.default_ssl_context()


def _signature(message: Message, body: str) -> dict[bytes | str, bytes | str]:
    """Return the headers that Standard Webhooks defines."""
    now = datetime.now(UTC)
    signatures = [Webhook(secret).sign(message.id, now, body) for secret in message.secrets]
    return {
        "Webhook-Id": message.id,
        "Webhook-Timestamp": str(int(now.timestamp())),
        "Webhook-Signature": " ".join(signatures),
    }


def _read_some(response: httpcore2.Response) -> None:
    """Read what a receiver usually says, so that it sees an orderly end; the status has come."""
    size = 0
    try:
        for chunk in response.iter_stream():
            size += len(chunk)
            if size >= _MAX_ANSWER_BYTES:
                return
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        return


def _judge(response: httpcore2.Response) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status=status)
    error = f"HTTP {status}"
    if 300 <= status < 400:
        error += ", and redirects are not followed"
    return Answer(status=status, error=error, retry_after_seconds=_retry_after(response))


def _retry_after(response: httpcore2.Response) -> float:
    for name, value in response.headers:
        if name.lower() == b"retry-after" and re.fullmatch(rb"\d{1,9}", value):
            return float(value)
    return 0.0


def _kind(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "the host's name cannot be resolved"
    if isinstance(error, httpcore2.ConnectError):
        return "no connection"
    return "the exchange failed"

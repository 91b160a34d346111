"""One message over real sockets and real TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpcore2
import pytest
import trustme
from standardwebhooks import WebhookVerificationError

from core.webhooks.sending import Message, Sender
from tests.support.receiver import Receiver, drip, receiver, status

SECRET = "whsec_dGhlIHNlY3JldCBvZiB0aGUgdGVzdHMgb2Ygd2ViaG9va3M="
OTHER_SECRET = "whsec_YW5vdGhlciBzZWNyZXQgb2YgdGhlIHRlc3RzIG9mIHdlYmhvb2s="
NAME = "hooks.example.test"
PUBLIC = "93.184.216.34"


class RecordingNetwork(httpcore2.SyncBackend):
    """Notes the addresses that a sender connects to; leads all of them to one loopback port."""

    def __init__(self, port: int) -> None:
        self.connected: list[tuple[str, int]] = []
        self._port = port

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        self.connected.append((host, port))
        return super().connect_tcp("127.0.0.1", self._port, timeout, local_address, socket_options)


class Resolver:
    """Answers every question with the next of its answers."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = list(answers)

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def secure_receiver(authority: trustme.CA) -> Iterator[Receiver]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    with receiver(tls=context) as running:
        yield running


@pytest.fixture
def plain_receiver() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def message(url: str, *secrets: str) -> Message:
    payload = {"type": "job.succeeded", "data": {"text": "naïve – 漢字", "n": 1}}
    return Message(id="msg-1", url=url, secrets=secrets or (SECRET,), payload=payload)


def sender(**options: Any) -> Sender:
    return Sender(**{"timeout_seconds": 5, "allow_private": True, **options})


def test_a_message_is_signed_so_that_the_standard_library_verifies_it(
    plain_receiver: Receiver,
) -> None:
    answer = sender().send(message(plain_receiver.url))
    assert (answer.status, answer.error) == (204, None)
    (received,) = plain_receiver.received
    assert received.verify(SECRET) == message("").payload
    assert received.path == "/hook"
    assert received.headers["webhook-id"] == "msg-1"
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 5
    assert received.headers["content-type"] == "application/json"
    assert received.headers["host"] == f"127.0.0.1:{plain_receiver.port}"
    with pytest.raises(WebhookVerificationError):
        received.verify(OTHER_SECRET)


def test_each_of_two_secrets_verifies_while_they_are_exchanged(plain_receiver: Receiver) -> None:
    sender().send(message(plain_receiver.url, SECRET, OTHER_SECRET))
    (received,) = plain_receiver.received
    assert received.verify(SECRET) == received.verify(OTHER_SECRET)


def test_the_connection_goes_to_the_checked_address_under_the_name_of_the_url(
    secure_receiver: Receiver, trusting: ssl.SSLContext
) -> None:
    resolver, network = Resolver([PUBLIC]), RecordingNetwork(secure_receiver.port)
    answer = sender(allow_private=False, resolver=resolver, network=network, tls=trusting).send(
        message(f"https://{NAME}/hook?a=1")
    )
    # The certificate is for the name, so the handshake named it.
    assert (answer.status, answer.error) == (204, None)
    assert network.connected == [(PUBLIC, 443)]
    assert resolver.asked == [(NAME, 443)]
    (received,) = secure_receiver.received
    assert received.headers["host"] == NAME
    assert received.path == "/hook?a=1"


def test_a_name_that_resolves_otherwise_the_second_time_leads_nowhere_else(
    plain_receiver: Receiver,
) -> None:
    """DNS rebinding: the name is looked up once, so its second answer is never asked for."""
    with receiver(host="127.0.0.2") as inside:
        inside_port = inside.port
        resolver = Resolver(["127.0.0.1"], ["127.0.0.2"])
        outside = sender(resolver=resolver)
        # Where the first answer leads nobody listens on this port; the second would arrive.
        answer = outside.send(message(f"http://{NAME}:{inside_port}/hook"))
        assert answer.error is not None
        assert answer.error.startswith("no connection")
        assert inside.received == []
        assert len(resolver.asked) == 1

    resolver, network = Resolver([PUBLIC], ["127.0.0.1"]), RecordingNetwork(plain_receiver.port)
    checked = sender(allow_private=False, resolver=resolver, network=network)
    checked.send(message(f"https://{NAME}/"))
    assert network.connected == [(PUBLIC, 443)]
    # At the next delivery the name is asked again, and then refused.
    answer = checked.send(message(f"https://{NAME}/"))
    assert "does not call" in str(answer.error)
    assert network.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["fe80::1%lo"],
        [PUBLIC, "192.168.0.1"],
        ["192.168.0.1", PUBLIC],
    ],
)
def test_a_name_with_any_address_inside_is_refused(
    plain_receiver: Receiver, addresses: list[str]
) -> None:
    network = RecordingNetwork(plain_receiver.port)
    checked = sender(allow_private=False, resolver=Resolver(addresses), network=network)
    answer = checked.send(message(f"https://{NAME}/"))
    assert answer.status is None
    assert answer.error == "the host resolves to an address that the service does not call"
    assert network.connected == []
    assert not any(address in answer.error for address in addresses)


def test_a_url_that_is_allowed_no_longer_is_not_called(plain_receiver: Receiver) -> None:
    for url in (plain_receiver.url, plain_receiver.url.replace("http:", "https:")):
        assert sender(allow_private=False).send(message(url)).error is not None
    assert plain_receiver.received == []


def test_the_next_address_is_tried_when_one_does_not_answer(plain_receiver: Receiver) -> None:
    resolver = Resolver(["127.0.0.2", "127.0.0.1"])
    answer = sender(resolver=resolver).send(message(f"http://{NAME}:{plain_receiver.port}/"))
    assert answer.status == 204


def test_a_certificate_of_another_name_or_authority_is_refused(
    secure_receiver: Receiver, trusting: ssl.SSLContext
) -> None:
    for name, context in (("other.example.test", trusting), (NAME, ssl.create_default_context())):
        answer = sender(resolver=Resolver(["127.0.0.1"]), tls=context).send(
            message(f"https://{name}:{secure_receiver.port}/")
        )
        assert answer.status is None
        assert "certificate verify failed" in str(answer.error)
    assert secure_receiver.received == []


def test_redirects_are_not_followed_and_proxies_not_used(
    plain_receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as elsewhere:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{elsewhere.port}")
        plain_receiver.answer = status(302, Location=elsewhere.url)
        answer = sender().send(message(plain_receiver.url))
        assert (answer.status, answer.error) == (302, "HTTP 302, and redirects are not followed")
        assert elsewhere.received == []
    assert len(plain_receiver.received) == 1


@pytest.mark.parametrize("code", [400, 404, 410, 429, 500, 503])
def test_what_is_not_a_success_is_an_error(plain_receiver: Receiver, code: int) -> None:
    plain_receiver.answer = status(code, Retry_After="120")
    answer = sender().send(message(plain_receiver.url))
    assert (answer.status, answer.error) == (code, f"HTTP {code}")
    assert answer.retry_after_seconds == 120


def test_a_head_that_trickles_in_does_not_outlast_the_timeout(plain_receiver: Receiver) -> None:
    gone = threading.Event()
    plain_receiver.answer = drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", gone)
    started = time.monotonic()
    answer = sender(timeout_seconds=0.5).send(message(plain_receiver.url))
    assert time.monotonic() - started < 2
    assert answer.error == "no answer within 0.5 seconds"
    assert gone.wait(5), "the connection stayed open"


def test_a_body_that_trickles_in_does_not_outlast_the_timeout(plain_receiver: Receiver) -> None:
    gone = threading.Event()
    plain_receiver.answer = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", gone)
    started = time.monotonic()
    answer = sender(timeout_seconds=0.5).send(message(plain_receiver.url))
    assert time.monotonic() - started < 2
    # The receiver has said that it has the message; what else it wanted to say does not matter.
    assert (answer.status, answer.error) == (200, None)
    assert gone.wait(5), "the connection stayed open"


def test_an_endless_body_is_not_read(plain_receiver: Receiver) -> None:
    gone = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"
    plain_receiver.answer = drip(head, b"x" * 65536, gone)
    started = time.monotonic()
    assert sender().send(message(plain_receiver.url)).error is None
    assert time.monotonic() - started < 2
    assert gone.wait(5), "the connection stayed open"


def test_a_handshake_that_never_ends_does_not_outlast_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        port = silent.getsockname()[1]
        answer = sender(timeout_seconds=0.4).send(message(f"https://127.0.0.1:{port}/"))
        assert time.monotonic() - started < 2
    assert answer.error == "no answer within 0.4 seconds"


@pytest.mark.parametrize("garbage", [b"\x00\xff" * 50, b"HTTP/1.1 999999 no\r\n\r\n", b""])
def test_an_answer_that_is_not_http_is_an_error(plain_receiver: Receiver, garbage: bytes) -> None:
    plain_receiver.answer = lambda handler: handler.wfile.write(garbage) and None
    answer = sender().send(message(plain_receiver.url))
    assert answer.status is None
    assert str(answer.error).startswith("the exchange failed")


def test_a_name_that_does_not_resolve_is_an_error() -> None:
    def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    answer = sender(resolver=unknown).send(message("https://nowhere.invalid/"))
    assert str(answer.error).startswith("the host's name cannot be resolved")


def test_a_name_server_that_does_not_answer_does_not_outlast_the_timeout() -> None:
    answered = threading.Event()

    def silent(host: str, port: int) -> Sequence[str]:
        answered.wait(10)
        return ["127.0.0.1"]

    started = time.monotonic()
    answer = sender(resolver=silent, timeout_seconds=0.3).send(message("https://slow.example/"))
    answered.set()
    assert time.monotonic() - started < 2
    assert answer.error == "no answer within 0.3 seconds"

"""Asking a server for streamed answers, and when each token came.

One event loop and bare connections: a heavier client would take the cores from the server that it
measures. Every server is asked in its own dialect, and counted in the same way.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import uvloop

from benchmarks.serving.prompts import Prompt

# Of each row: fewer say nothing about a rate.
_LEAST_TOKENS: Final = 8


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: What is asked.
        adapter: Number of the adapter; `None` is the base model.
        new_tokens: Length of the answer; no end token ends it earlier.
    """

    prompt: Prompt
    adapter: int | None
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    """When an answer came; all times are of `time.monotonic`, in seconds.

    Attributes:
        sent: When the request was sent.
        times: When its pieces came. A piece may have several tokens: those that end within a
            character come with the next one.
        tokens: Tokens of the answer.
        prompt_tokens: Tokens of the prompt, as the server counts them.
    """

    sent: float
    times: list[float]
    tokens: int
    prompt_tokens: int

    @property
    def first_token_seconds(self) -> float:
        """From the request to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Dialect(Protocol):
    """How one kind of server is asked."""

    def request(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """Return path and body."""
        ...

    def read(self, event: str, data: str) -> tuple[bool, tuple[int, int] | None]:
        """Read one server-sent event.

        Returns:
            Whether it brought tokens; and at the end tokens of prompt and answer.

        Raises:
            RuntimeError: It says that the request failed.
        """
        ...


class HttpSide:
    """A server that answers over HTTP.

    Args:
        name: What it is called in tables.
        url: Where it listens.
        dialect: How it is asked.
    """

    def __init__(self, name: str, url: str, dialect: Dialect) -> None:
        self.name = name
        self._address = urlsplit(url)
        self._dialect = dialect

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Send all requests at once and return the answers."""

        async def all_at_once() -> list[Answer]:
            return await asyncio.gather(*map(self.ask, asks))

        return uvloop.run(all_at_once())

    async def ask(self, ask: Ask) -> Answer:
        """Send one request and return its answer.

        Raises:
            RuntimeError: The server refuses it or fails.
        """
        path, body = self._dialect.request(ask)
        content = json.dumps(body).encode()
        sent = time.monotonic()
        transport, arrivals = await asyncio.get_running_loop().create_connection(
            _Arrivals, self._address.hostname, self._address.port
        )
        try:
            transport.write(
                f"POST {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            await arrivals.ended
        finally:
            transport.close()
        return self._read(_split(arrivals.pieces), sent, ask)

    def _read(self, lines: list[tuple[bytes, float]], sent: float, ask: Ask) -> Answer:
        if not lines or b" 200 " not in lines[0][0]:
            said = b"".join(line for line, _ in lines)
            raise RuntimeError(f"{self.name}: {said.decode()[-2000:]}")
        # The lines between events, of headers and chunks, begin with neither word.
        times, counts, event = [], None, ""
        for line, came in lines:
            if line.startswith(b"event:"):
                event = line[6:].strip().decode()
            elif line.startswith(b"data:"):
                brought, ended = self._dialect.read(event, line[5:].strip().decode())
                if brought:
                    times.append(came)
                counts = ended or counts
        if counts is None or not times:
            raise RuntimeError(f"{self.name}: the stream ended before the answer did")
        if counts[1] != ask.new_tokens or counts[0] != len(ask.prompt.token_ids):
            raise RuntimeError(f"{self.name}: {counts} tokens of prompt and answer")
        return Answer(sent, times, tokens=counts[1], prompt_tokens=counts[0])


class _Arrivals(asyncio.Protocol):
    """Notes what comes on a connection and when; it is read when nobody is measured any more.

    Attributes:
        pieces: What came, and at which time of `time.monotonic`.
        ended: The server has closed the connection.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[bytes, float]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append((data, time.monotonic()))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)


def _split(pieces: Sequence[tuple[bytes, float]]) -> list[tuple[bytes, float]]:
    """Return lines, each with the time at which its last byte came."""
    lines, open_line = [], b""
    for piece, came in pieces:
        *whole, open_line = (open_line + piece).split(b"\n")
        lines += [(line + b"\n", came) for line in whole]
    return [*lines, (open_line, pieces[-1][1])] if open_line else lines


def whole_rate(answers: Sequence[Answer]) -> float:
    """Return tokens per second of all answers together, the reading of the prompts included."""
    seconds = max(a.times[-1] for a in answers) - min(a.sent for a in answers)
    return sum(answer.tokens for answer in answers) / seconds


def decode_rate(answers: Sequence[Answer]) -> float | None:
    """Return tokens per second while all rows are computed side by side.

    That is from the moment when the last of them has its first token until the first of them ends;
    `None` if none or hardly any of their tokens come in that time.
    """
    start = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    tokens = 0.0
    for answer in answers:
        pieces = sum(start < time_ <= end for time_ in answer.times)
        tokens += pieces * answer.tokens / len(answer.times)
    return tokens / (end - start) if tokens >= _LEAST_TOKENS * len(answers) else None


def prompt_rate(answers: Sequence[Answer]) -> float:
    """Return prompt tokens per second until the last of the rows has its first token."""
    seconds = max(a.times[0] for a in answers) - min(a.sent for a in answers)
    return sum(answer.prompt_tokens for answer in answers) / seconds

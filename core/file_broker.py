"""A message broker in a directory, for one machine without Redis: kombu's file-system transport.

Owns how wake-ups are written and read; nothing of value is ever in them, so a damaged or deleted
message is dropped without ado. Differs from kombu's own: a message appears by rename, so that a
reader never meets half of one, and any directory may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from kombu.transport import TRANSPORT_ALIASES, filesystem

SCHEME = "tunesmith-files"

_POLL_SECONDS = 0.2


class Channel(filesystem.Channel):  # type: ignore[misc]
    """Messages are files `<time>_<random>.<queue>.msg` in one directory."""

    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:
        name = f"{time.time_ns():020d}_{uuid4().hex}"
        directory = _made(self.data_folder_out)
        # Readers look for names that end in `.<queue>.msg`; this one does not.
        aside = directory / f"{name}.writing"
        try:
            aside.write_bytes(json.dumps(payload).encode())
            aside.rename(directory / f"{name}.{queue}.msg")
        finally:
            aside.unlink(missing_ok=True)

    def _get(self, queue: str) -> dict[str, Any]:
        private = _made(self.processed_folder)
        for name in self._waiting(queue):
            # The rename decides between concurrent readers; one of them finds the file gone.
            taken = private / f"{uuid4().hex}.msg"
            try:
                (Path(self.data_folder_in) / name).rename(taken)
                content = taken.read_bytes()
            except FileNotFoundError:
                continue
            taken.unlink(missing_ok=True)
            try:
                payload = json.loads(content)
            except ValueError:
                continue
            if isinstance(payload, dict):
                return payload
        raise Empty

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        _made(self.control_folder)
        super()._queue_bind(exchange, routing_key, pattern, queue)

    def _size(self, queue: str) -> int:
        return len(self._waiting(queue))

    def _purge(self, queue: str) -> int:
        names = self._waiting(queue)
        for name in names:
            (Path(self.data_folder_in) / name).unlink(missing_ok=True)
        return len(names)

    def _waiting(self, queue: str) -> list[str]:
        names = os.listdir(_made(self.data_folder_in))
        return sorted(name for name in names if name.partition(".")[2] == f"{queue}.msg")


class Transport(filesystem.Transport):  # type: ignore[misc]
    """The transport behind URLs of `SCHEME`."""

    Channel = Channel

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver a message; return soon without one, since only then a worker looks for signals.

        Raises:
            TimeoutError: There was none.
        """
        soon = _POLL_SECONDS if timeout is None else min(timeout, _POLL_SECONDS)
        super().drain_events(connection, timeout=soon)


def register() -> None:
    """Make kombu know `SCHEME`."""
    TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"


def transport_options(directory: Path) -> dict[str, Any]:
    """Return kombu's options for a broker in `directory`, and make it private to this user."""
    _made(directory)
    return {
        "data_folder_in": str(_made(directory / "messages")),
        "data_folder_out": str(directory / "messages"),
        "processed_folder": str(directory / "taken"),
        "control_folder": str(_made(directory / "control")),
        "polling_interval": _POLL_SECONDS,
    }


def _made(directory: str | Path) -> Path:
    path = Path(directory)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path

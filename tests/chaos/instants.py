"""The other end of the fail points: hears where processes are, and lets them go on or not.

See `core.failpoints`. A process that reports an instant waits for one byte; whoever holds it
decides when that comes, and may kill the process instead.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class Hold:
    """A process that waits at an instant.

    Attributes:
        instant: Where it is.
        pid: Which process.
        details: What else it said, such as the job.
    """

    instant: str
    pid: int
    details: dict[str, Any]
    connection: socket.socket

    def release(self) -> None:
        """Let the process go on, if it lives; more than once does no harm."""
        # It may be gone, or may have been let go already.
        with contextlib.suppress(OSError):
            self.connection.sendall(b"\n")
        self.connection.close()


class Listener:
    """Listens to all processes of a cluster.

    Args:
        take: Called from a thread of its own with every process that waits; tells whether the
            process is held. Any other one goes on at once.
    """

    def __init__(self, take: Callable[[Hold], bool]) -> None:
        self._take = take
        # A socket's path must be short.
        self._directory = Path(tempfile.mkdtemp(prefix="instants-"))
        self.path = self._directory / "socket"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        self._socket.listen(64)
        self._thread = threading.Thread(target=self._listen, name="instants", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; nobody is held up any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        shutil.rmtree(self._directory)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            hold = _read(connection)
            if hold is None:
                connection.close()
            elif not self._take(hold):
                hold.release()


def _read(connection: socket.socket) -> Hold | None:
    connection.settimeout(_REPORT_SECONDS)
    line = b""
    # A process that is killed in the middle of its report says no more.
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n"):
            chunk = connection.recv(4096)
            if not chunk:
                return None
            line += chunk
        report = json.loads(line)
        return Hold(report.pop("instant"), report.pop("pid"), report, connection)
    return None

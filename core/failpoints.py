"""Fail points: named instants at which a test can stop a process and do harm.

Inactive, and next to free, unless `TUNESMITH_FAILPOINTS` names a Unix socket. Then every process
that reaches an instant says so there, as one JSON line, and waits for a line before it goes on; by
that time it may have been killed, or the disk, the broker or the database may be gone. The idea is
that of FreeBSD's fail(9).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any, Final, Literal

FAILPOINTS_VARIABLE: Final = "TUNESMITH_FAILPOINTS"

Instant = Literal[
    "job.claimed",  # a claim is committed, nothing is done yet
    "base.load",  # the trainer is about to load the base model
    "train.step",  # an optimizer step is done and not yet reported
    "checkpoint.write",  # the trainer has written half of a checkpoint
    "checkpoint.upload",  # the store has part of a checkpoint
    "artifact.upload",  # the store has part of an adapter
    "publish.alias",  # the version is added, the alias not moved, nothing committed
    "publish.commit",  # everything is written, nothing committed
    "publish.committed",  # the job has succeeded, nobody was told
    "events.flush",  # events and metrics are written, nothing committed
]

_PATIENCE_SECONDS = 120.0

_socket_path = os.environ.get(FAILPOINTS_VARIABLE)


def reached(instant: Instant, **details: Any) -> None:
    """Report that this process is at an instant and wait for leave to go on.

    Args:
        instant: Where it is.
        details: Shown to the listener: job, attempt, step.
    """
    if _socket_path is None:
        return
    report = {"instant": instant, "pid": os.getpid(), **details}
    # A listener that is gone holds nobody up.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        connection.settimeout(_PATIENCE_SECONDS)
        connection.connect(_socket_path)
        connection.sendall(json.dumps(report).encode("ascii") + b"\n")
        connection.recv(1)

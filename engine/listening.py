"""Where the engine listens: a Unix socket for this user alone, or TCP behind a shared secret."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from core.errors import Conflict, InvalidInput
from core.inference.engine import parse_engine_address

_BACKLOG = 128


def open_listener(address: str, *, secret: str) -> socket.socket:
    """Return a listening socket.

    Args:
        address: `unix:PATH` or `http://HOST:PORT`.
        secret: The shared secret; may be empty for a Unix socket only.

    Raises:
        InvalidInput: The address is malformed, or TCP is asked for without a secret.
        Conflict: Another engine listens there.
    """
    where = parse_engine_address(address)
    if isinstance(where, Path):
        return _listen_on_path(where)
    if not secret:
        raise InvalidInput(
            f"the engine will not listen on {address} without a shared secret",
            code="engine_secret_required",
            field="TUNESMITH_ENGINE_SECRET",
            hint="Set TUNESMITH_ENGINE_SECRET for API and engine, or listen on unix:PATH.",
        )
    host, port = where
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _listen(listener, (host, port), address)


def _listen_on_path(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.parent.stat()
    if owner.st_uid != os.getuid():
        raise Conflict(
            f"{path.parent} belongs to another user",
            code="engine_socket_unsafe",
            hint="Choose a data directory of your own.",
        )
    path.parent.chmod(0o700)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The directory keeps others out while the socket has not its own permissions yet.
    listener = _listen(listener, str(path), f"unix:{path}")
    path.chmod(0o600)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict(f"{path} exists and is no socket", code="engine_socket_unsafe")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise _taken(f"unix:{path}")


def _listen(listener: socket.socket, where: str | tuple[str, int], address: str) -> socket.socket:
    try:
        listener.bind(where)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise _taken(address) from error
    return listener


def _taken(address: str) -> Conflict:
    return Conflict(
        f"the engine cannot listen on {address}",
        code="engine_address_taken",
        hint="Stop the engine that runs there already, or choose another address.",
    )

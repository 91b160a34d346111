"""The whole service on one machine: what must hold before it starts, and what it tells when ready.

Owns `run/serve.json`, by which tools find the running service. The processes themselves are the
supervisor's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
from pathlib import Path

import httpx2
from sqlalchemy.exc import SQLAlchemyError

from core.auth import list_keys
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, InvalidInput, Unavailable
from core.lifeline import exit_with_parent
from core.logging import configure, get_logger
from service.supervisor import Supervisor, locked, service_processes

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_READY_TIMEOUT_SECONDS = 5.0

log = get_logger(__name__)


def run_service(
    settings: Settings, *, host: str, port: int, api_workers: int, as_json: bool
) -> int:
    """Run all parts until interrupted and return the exit code.

    Args:
        settings: Of all parts.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_workers: Processes of the API.
        as_json: Announce readiness as JSON.

    Raises:
        InvalidInput: The service would be open to others without keys, or the host is no address.
        Conflict: The port is taken, or a service runs on this data directory.
    """
    from migrations import upgrade

    configure(settings, "serve")
    exit_with_parent(settings.grace_seconds * 2)
    lock, state = settings.run_dir / "serve.lock", settings.run_dir / "serve.json"
    with locked(lock):
        # Held for a moment: from here on no other service on this directory is disturbed.
        state.unlink(missing_ok=True)
        upgrade(settings.resolved_database_url)
    check_exposure(settings, host)
    warn_of_unreachable_names(settings, host)
    port = find_port(host, port)
    url = url_of(host, port)

    def is_ready() -> bool:
        allowed = settings.allowed_hosts.split(",")[0].strip()
        response = httpx2.get(
            url_of(_WILDCARDS.get(host, host), port) + "/readyz",
            headers={"Host": "localhost" if allowed in {"", "*"} else allowed},
            timeout=_READY_TIMEOUT_SECONDS,
            trust_env=False,
        )
        return response.is_success

    def is_ready_quietly() -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return is_ready()
        return False

    def announce() -> None:
        facts = {"url": url, "pid": os.getpid()}
        write_state(state, facts)
        line = (
            json.dumps({**facts, "data_dir": str(settings.root)})
            if as_json
            else f"Tunesmith is ready at {url}  (data in {settings.root}; Ctrl-C stops it)"
        )
        # Whoever started us may not listen any more; that is no reason to stop serving.
        with contextlib.suppress(OSError):
            print(line, flush=True)

    parts = [
        dataclasses.replace(part, ready=is_ready_quietly) if part.name == "api" else part
        for part in service_processes(settings, host=host, port=port, api_workers=api_workers)
    ]
    supervisor = Supervisor(
        parts, lock_path=lock, grace_seconds=settings.grace_seconds, on_ready=announce
    )
    try:
        return supervisor.run()
    finally:
        forget_state(state)


def check_exposure(settings: Settings, host: str) -> None:
    """Refuse to be reachable from other machines without keys.

    Raises:
        InvalidInput: Code `exposed_without_keys`, or `unknown_host` for what is no address.
        Unavailable: The keys cannot be read.
    """
    if is_loopback(host):
        return
    if settings.auth != "keys":
        raise InvalidInput(
            f"{host} can be reached from other machines, and authentication is off",
            code="exposed_without_keys",
            field="host",
            hint="Set TUNESMITH_AUTH=keys and create a key with `tunesmith keys create`, "
            "or listen on 127.0.0.1.",
        )
    database = Database(settings.resolved_database_url)
    try:
        with database.session() as session:
            keys = list_keys(session)
    except SQLAlchemyError as error:
        raise Unavailable(
            f"the API keys cannot be read: {type(error).__name__}",
            code="database_unavailable",
            hint="`tunesmith db upgrade` creates the tables; `tunesmith doctor` looks for causes.",
        ) from error
    finally:
        database.close()
    if all(key.revoked_at for key in keys):
        raise InvalidInput(
            f"{host} can be reached from other machines, and nobody has a key",
            code="exposed_without_keys",
            field="host",
            hint="Create a key with `tunesmith keys create` first.",
        )


def warn_of_unreachable_names(settings: Settings, host: str) -> None:
    """Log a warning where other machines reach the service, but only by names that it refuses."""
    default = type(settings).model_fields["allowed_hosts"].default
    if not is_loopback(host) and settings.allowed_hosts == default:
        log.warning(
            "requests_from_elsewhere_refused",
            allowed_hosts=settings.allowed_hosts,
            hint="set TUNESMITH_ALLOWED_HOSTS to the names by which clients call this machine",
        )


def is_loopback(host: str) -> bool:
    """Tell whether an address is reachable from this machine alone.

    Raises:
        InvalidInput: Code `unknown_host`; it is neither an IP address nor `localhost`.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InvalidInput(
            f"{host!r} is no IP address",
            code="unknown_host",
            field="host",
            hint="Give an address of this machine, such as 127.0.0.1 or 0.0.0.0.",
        ) from error


def find_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0.

    Raises:
        Conflict: Code `port_unavailable`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: connections of an earlier run that linger are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"cannot listen on {host} port {port}: {error.strerror}",
                code="port_unavailable",
                field="port",
                hint="Choose another with --port; 0 takes a free one.",
            ) from error
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Return the base URL of an address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_state(path: Path, facts: dict[str, object]) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(facts) + "\n")
    aside.replace(path)


def forget_state(path: Path) -> None:
    """Remove the state file if this process wrote it."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text())["pid"] == os.getpid():
            path.unlink()

"""Whether one process of the service is well, for whoever supervises it.

Each check asks the process itself, or what it has reported, and takes at most a few seconds. Knows
no model library and starts nothing.

A probe is a process every few seconds, so each imports only what it needs, in its function.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from core.errors import Unavailable

if TYPE_CHECKING:
    from core.config import Settings

_TIMEOUT_SECONDS = 5.0


def check_api(host: str, port: int, *, ready: bool) -> str:
    """Return what the API answers.

    Args:
        host: Address that it listens on.
        port: Port that it listens on.
        ready: Ask not only whether it answers, but whether the whole service can work.

    Raises:
        Unavailable: Code `api_unavailable` or `service_not_ready`, with the reasons.
    """
    import httpx2

    where = f"[{host}]" if ":" in host else host
    url = f"http://{where}:{port}{'/readyz' if ready else '/healthz'}"
    try:
        response = httpx2.get(url, timeout=_TIMEOUT_SECONDS, trust_env=False)
        members = response.json()
        if response.is_success and "version" in members:
            return f"version {members['version']} answers"
        checks = members["checks"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"no API answers on {host} port {port} ({type(error).__name__})", code="api_unavailable"
        ) from error
    failed = {name: check["reason"] for name, check in checks.items() if not check["ok"]}
    if response.is_success:
        return "ready" + "".join(f"; {name}: {reason}" for name, reason in failed.items())
    raise Unavailable(
        "; ".join(f"{name}: {reason}" for name, reason in failed.items()), code="service_not_ready"
    )


def check_engine(settings: Settings, address: str) -> str:
    """Return what the engine at `address` says of itself.

    Raises:
        TunesmithError: It cannot be reached, refuses our secret or still loads.
    """
    from service.engine_pool import open_engine
    from service.vllm_engine_front import FrontProcess

    async def ask() -> str:
        engine = open_engine(
            settings, address, front=FrontProcess(), timeout_seconds=_TIMEOUT_SECONDS
        )
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                status = await engine.status()
        finally:
            await engine.aclose()
        if not status.ready:
            raise Unavailable("the engine is still loading", code="engine_loading")
        return f"ready on {status.device}, {len(status.adapters)} adapters in memory"

    try:
        return asyncio.run(ask())
    except TimeoutError as error:
        raise Unavailable("the engine does not answer in time", code="engine_silent") from error


def check_worker(settings: Settings, queue: str | None, pid: int | None) -> str:
    """Return which worker of this host has reported itself to the database lately.

    Args:
        settings: Name the database and how long a worker may be silent.
        queue: Only workers of this queue.
        pid: Only the worker of this process.

    Raises:
        Unavailable: Code `worker_silent`; no worker that fits has reported lately.
    """
    from core.db.repositories.workers import WorkerRepository
    from core.db.session import Database

    host = socket.gethostname()
    database = Database(settings.resolved_database_url)
    try:
        with database.session() as session:
            workers = WorkerRepository(session).list()
    finally:
        database.close()
    for worker, silent_seconds in workers:
        fits = queue in (None, worker.queue) and pid in (None, worker.pid) and worker.host == host
        if fits and silent_seconds <= settings.worker_silence_seconds:
            return f"{worker.id} reported {max(0.0, silent_seconds):.0f} s ago"
    wanted = f"worker{f' of queue {queue}' if queue else ''}{f' with id {pid}' if pid else ''}"
    raise Unavailable(
        f"no {wanted} on {host} has reported within {settings.worker_silence_seconds:g} s",
        code="worker_silent",
    )

"""Whether the service can do its work, part by part, with the reason where it cannot."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from alembic.runtime.migration import MigrationContext
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

import migrations
from core import jobs
from core.errors import TunesmithError
from core.queue import create_celery
from core.reads import WorkerRead
from service.deps import Services
from service.overview import ENGINE_TIMEOUT_SECONDS
from service.schemas import Check, Readiness

_OK = Check(ok=True)
_TIMEOUT_SECONDS = 3.0


async def check(services: Services) -> Readiness:
    """Return the state of all parts; none takes longer than a few seconds."""
    database, storage, broker, engine = await asyncio.gather(
        _in_time(lambda: _check_database(services)),
        _in_time(lambda: _check_storage(services)),
        _in_time(lambda: _check_broker(services)),
        _check_engine(services),
    )
    checks = {"database": database, "storage": storage, "broker": broker, "engine": engine}
    for queue in ("train", "light"):
        checks[f"{queue}_worker"] = (
            await _in_time(lambda queue=queue: _check_worker(services, queue))  # type: ignore[misc]
            if database.ok
            else _failed("unknown while the database cannot be read")
        )
    return Readiness(
        ready=all(result.ok or not result.required for result in checks.values()), checks=checks
    )


async def _in_time(part: Callable[[], Check]) -> Check:
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            return await run_in_threadpool(part)
    except TimeoutError:
        return _failed("no answer in time")


def _check_database(services: Services) -> Check:
    try:
        with services.database.engine.connect() as connection:
            present = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        return _failed(f"the database cannot be reached ({type(error).__name__})")
    if migrations.standing(present) != "behind":
        return _OK
    return _failed(
        f"the schema is at {present or 'nothing'}, not {migrations.head()}; "
        "run `tunesmith db upgrade`"
    )


def _check_storage(services: Services) -> Check:
    try:
        services.store.check_writable()
    except TunesmithError as error:
        return _failed(error.message)
    return _OK


def _check_broker(services: Services) -> Check:
    """Check the broker; it only wakes workers, so the service is ready without it."""
    if not services.settings.broker_url:
        result = _check_writable(services.settings.root)
        return result.model_copy(update={"required": False})
    celery = create_celery(services.settings)
    try:
        with celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=_TIMEOUT_SECONDS)
    except (KombuError, OSError) as error:
        reason = f"the broker cannot be reached ({type(error).__name__}); workers look every "
        reason += f"{services.settings.idle_poll_seconds:g} s by themselves"
        return _failed(reason, required=False)
    finally:
        celery.close()
    return Check(ok=True, required=False)


async def _check_engine(services: Services) -> Check:
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT_SECONDS):
            status = await services.engine.status()
    except TimeoutError:
        return _failed("no answer in time")
    except TunesmithError as error:
        return _failed(error.message)
    return _OK if status.ready else _failed("the engine is still loading its base model")


def _check_worker(services: Services, queue: str) -> Check:
    try:
        with services.database.session() as session:
            workers = [worker for worker in jobs.list_workers(session) if worker.queue == queue]
    except SQLAlchemyError as error:
        return _failed(f"the database cannot be read ({type(error).__name__})")
    if any(_is_alive(services, worker) for worker in workers):
        return _OK
    if not workers:
        return _failed(f"no worker serves the queue {queue!r}")
    newest = min(worker.seconds_since_heartbeat for worker in workers)
    return _failed(f"the last report of a {queue} worker is {newest:.0f} s old")


def _is_alive(services: Services, worker: WorkerRead) -> bool:
    return worker.seconds_since_heartbeat <= services.settings.worker_silence_seconds


def _check_writable(directory: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "error")
        return _failed(f"the data directory cannot be written to ({name})")
    return _OK


def _failed(reason: str, *, required: bool = True) -> Check:
    return Check(ok=False, reason=reason, required=required)

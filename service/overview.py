"""What operators look at, gathered from database and engine."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from core import jobs
from core.db.repositories import overview as queries
from core.errors import TunesmithError
from core.inference.engine import EngineStatus
from core.logging import get_logger
from core.principal import Principal
from core.reads import WorkerRead
from service.deps import Services
from service.metrics import Snapshot
from service.schemas import EngineAdapter, EngineRead

ENGINE_TIMEOUT_SECONDS = 2.0

log = get_logger(__name__)


def workers(session: Session, principal: Principal) -> list[WorkerRead]:
    """Return all workers; a job of another project is not named."""
    found = jobs.list_workers(session)
    busy = [worker.job_id for worker in found if worker.job_id is not None]
    own = queries.owned_jobs(session, principal, busy)
    return [
        worker
        if worker.job_id in own or worker.job_id is None
        else worker.model_copy(update={"job_id": None})
        for worker in found
    ]


def engine_view(services: Services, principal: Principal, status: EngineStatus) -> EngineRead:
    """Return the engine's state with the adapters that the caller may know of.

    An administrator sees every resident digest, named where it is the own project's.
    """
    known = [*status.adapters, *status.evicted]
    with services.database.session() as session:
        names = queries.names_by_digest(session, principal, [adapter.digest for adapter in known])
    adapters = [
        EngineAdapter(**adapter.model_dump(), names=list(names.get(adapter.digest, ())))
        for adapter in known
        if adapter.digest in names or "admin" in principal.scopes
    ]
    return EngineRead.of(status, adapters)


async def engine_status(services: Services) -> EngineStatus | None:
    """Return the engine's status, or `None` when it does not answer soon."""
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT_SECONDS):
            return await services.engine.status()
    except (TunesmithError, TimeoutError):
        return None


async def scrape(services: Services) -> Snapshot:
    """Read what the metrics show beside the counters; a part that is down is left out."""
    engine = await engine_status(services)
    try:
        totals = await run_in_threadpool(_read_totals, services)
    except SQLAlchemyError as error:
        log.warning("scrape_without_database", error=type(error).__name__)
        return Snapshot(totals=None, engine=engine)
    return Snapshot(totals=totals, engine=engine)


def _read_totals(services: Services) -> queries.Totals:
    with services.database.session() as session:
        return queries.read_totals(
            session, worker_silence_seconds=services.settings.worker_silence_seconds
        )

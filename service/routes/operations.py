"""What operators and probes ask: residency, workers, metrics, health."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool

from core import quotas
from core.reads import Page, UsageRead, WorkerRead
from service import metrics, overview, readiness
from service.auth import Reader
from service.deps import ReadSession, ServicesDep
from service.openapi import problems
from service.schemas import EngineRead, Health, Readiness
from service.version import service_version

router = APIRouter(tags=["operations"])


@router.get("/engine", summary="Read the engine's state", responses=problems(401, 403, 503))
async def engine_state(services: ServicesDep, principal: Reader) -> EngineRead:
    """Return which adapters are in memory, and what the engine has done since it started."""
    status = await services.engine.status()
    return await run_in_threadpool(overview.engine_view, services, principal, status)


@router.get("/workers", summary="List workers", responses=problems(401, 403))
def list_workers(session: ReadSession, principal: Reader) -> Page[WorkerRead]:
    """Return the worker processes and which of the caller's jobs they work on."""
    return Page(data=overview.workers(session, principal))


@router.get("/usage", summary="Read the project's usage", responses=problems(401, 403))
def read_usage(session: ReadSession, principal: Reader, services: ServicesDep) -> UsageRead:
    """Return what the project's jobs have used so far, and its quotas with what counts for them.

    Totals hold for all time, also for jobs that were deleted since. A job that runs is counted
    when it ends. Stored bytes are those of data sets and adapters.
    """
    return quotas.usage(session, principal, services.settings)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        **problems(401, 403),
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}},
    },
)
async def prometheus_metrics(services: ServicesDep, principal: Reader) -> Response:
    """Return all metrics of the service."""
    snapshot = await overview.scrape(services)
    content = await run_in_threadpool(metrics.render, snapshot)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/healthz", summary="Liveness")
async def health() -> Health:
    """Answer as long as this process does."""
    return Health(version=service_version())


@router.get(
    "/readyz",
    summary="Readiness",
    responses={503: {"model": Readiness, "description": "Not ready; the checks say why."}},
)
async def ready(services: ServicesDep, response: Response) -> Readiness:
    """Tell whether jobs can be accepted, trained and served, and otherwise what is missing."""
    report = await readiness.check(services)
    response.status_code = 200 if report.ready else 503
    return report

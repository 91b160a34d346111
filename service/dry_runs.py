"""Dry runs over HTTP: start one and wait for its report for a while, without holding a thread."""

from __future__ import annotations

import asyncio
import time

from starlette.concurrency import run_in_threadpool

from core import jobs
from core.principal import Principal
from core.reads import DryRunRead
from core.specs import JobSpec
from service.deps import Services

_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 0.5


async def start_and_wait(
    services: Services, principal: Principal, spec: JobSpec, wait_seconds: float
) -> DryRunRead:
    """Start a dry run and return it when it has ended, or as it stands when the time is up.

    Args:
        services: The parts of the service.
        principal: Who asks.
        spec: What would be trained.
        wait_seconds: How long to wait for the report.

    Raises:
        TunesmithError: See `core.jobs.start_dry_run`.
    """
    until = time.monotonic() + wait_seconds
    found = await run_in_threadpool(_start, services, principal, spec)
    pause_seconds = _POLL_SECONDS
    while found.status == "validating" and not services.stopping.is_set():
        left_seconds = until - time.monotonic()
        if left_seconds <= 0:
            break
        await asyncio.sleep(min(pause_seconds, left_seconds))
        pause_seconds = min(1.2 * pause_seconds, _LONGEST_POLL_SECONDS)
        found = await run_in_threadpool(_look, services, principal, found.id)
    return found


def _start(services: Services, principal: Principal, spec: JobSpec) -> DryRunRead:
    started = jobs.start_dry_run(services.database, principal, spec, settings=services.settings)
    services.queue.wake("light")
    return started


def _look(services: Services, principal: Principal, dry_run_id: str) -> DryRunRead:
    with services.database.session() as session:
        return jobs.get_dry_run(session, principal, dry_run_id)

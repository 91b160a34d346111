"""A job's history in the forms that HTTP knows: pages, live event streams, CSV.

A stream holds no session: it looks into the database briefly, several times a second.
"""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from core import jobs
from core.errors import InvalidInput, NotFound
from core.principal import Principal
from core.reads import EventRead, MetricRead, Page
from service.deps import Services
from service.streaming import EventStream, encode_event

POLL_SECONDS = 0.3
TERMINAL_EVENTS = frozenset({"succeeded", "failed", "cancelled"})
_EVENTS_PER_LOOK = 500
_METRICS_PER_LOOK = 5000
_CSV_COLUMNS = tuple(MetricRead.model_fields)


def wants_stream(accept: str | None) -> bool:
    """Tell whether an Accept header asks for server-sent events."""
    return "text/event-stream" in (accept or "").lower()


def wants_csv(accept: str | None) -> bool:
    """Tell whether an Accept header asks for CSV rather than JSON."""
    lowered = (accept or "").lower()
    return "text/csv" in lowered and "application/json" not in lowered


def event_page(
    services: Services, principal: Principal, job_id: str, after: int, limit: int
) -> Page[EventRead]:
    """Return events with an id above `after`, oldest first."""
    with services.database.session() as session:
        return jobs.events(session, principal, job_id, after=after, limit=limit)


def follow(
    services: Services, principal: Principal, job_id: str, after: int, last_event_id: str | None
) -> Response:
    """Return the live stream of a job's events, from behind the last one the client has.

    Raises:
        NotFound: Code `unknown_job`.
        InvalidInput: Code `invalid_event_id`.
    """
    resuming = last_event_id is not None and last_event_id.strip() != ""
    if resuming:
        after = _event_id(str(last_event_id))
    first = event_page(services, principal, job_id, after, _EVENTS_PER_LOOK)
    if resuming and not first.data and _has_ended(services, principal, job_id, after):
        # A browser would otherwise reconnect for ever to a stream that has nothing to say.
        return Response(status_code=204)
    return EventStream(_events(services, principal, job_id, first, after))


def metrics_page(
    services: Services,
    principal: Principal,
    job_id: str,
    attempt: int | None,
    cursor: str | None,
    limit: int,
) -> Page[MetricRead]:
    """Return measurements by attempt and step."""
    with services.database.session() as session:
        return jobs.metrics(session, principal, job_id, attempt=attempt, cursor=cursor, limit=limit)


def metrics_csv(
    services: Services, principal: Principal, job_id: str, attempt: int | None
) -> Response:
    """Return all measurements as CSV with a header line."""
    first = metrics_page(services, principal, job_id, attempt, None, _METRICS_PER_LOOK)

    def lines() -> Iterator[str]:
        page = first
        yield _csv_line(_CSV_COLUMNS)
        while True:
            yield "".join(_csv_line(_csv_values(row)) for row in page.data)
            if page.next_cursor is None:
                return
            page = metrics_page(
                services, principal, job_id, attempt, page.next_cursor, _METRICS_PER_LOOK
            )

    disposition = {"Content-Disposition": f'attachment; filename="{job_id}-metrics.csv"'}
    return StreamingResponse(lines(), media_type="text/csv", headers=disposition)


async def _events(
    services: Services, principal: Principal, job_id: str, page: Page[EventRead], after: int
) -> AsyncGenerator[bytes, None]:
    while not services.stopping.is_set():
        for event in page.data:
            after = event.id
            yield encode_event(event.model_dump_json(), event=event.type, id=str(event.id))
            if event.type in TERMINAL_EVENTS:
                return
        if page.next_cursor is None:
            # Another process writes the events, so there is nothing to wait on but the clock.
            await asyncio.sleep(POLL_SECONDS)
        try:
            page = await run_in_threadpool(
                event_page, services, principal, job_id, after, _EVENTS_PER_LOOK
            )
        except NotFound:
            return  # Deleted while it was followed.
        if not page.data and await run_in_threadpool(
            _has_ended, services, principal, job_id, after
        ):
            return


def _has_ended(services: Services, principal: Principal, job_id: str, after: int) -> bool:
    """Tell whether the event with the id `after` was the last one."""
    if after == 0:
        return False
    last = event_page(services, principal, job_id, after - 1, 1).data
    return bool(last) and last[0].type in TERMINAL_EVENTS


def _event_id(value: str) -> int:
    text = value.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidInput(
            "Last-Event-ID must be the id of an event",
            code="invalid_event_id",
            field="Last-Event-ID",
        )
    return int(text)


def _csv_values(row: MetricRead) -> list[str]:
    members = row.model_dump(mode="json")
    return ["" if members[name] is None else str(members[name]) for name in _CSV_COLUMNS]


def _csv_line(values: tuple[str, ...] | list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()

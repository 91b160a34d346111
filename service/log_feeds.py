"""A job's log in the forms that HTTP knows: a page, plain text, a live stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from core import jobs
from core.errors import InvalidInput, NotFound
from core.principal import Principal
from core.reads import LogPage
from service.deps import Services
from service.job_feeds import POLL_SECONDS
from service.streaming import EventStream, encode_event

_LINES = 200
_LINES_PER_LOOK = 1000


@dataclass(frozen=True)
class LogQuery:
    """Which lines of which job.

    Attributes:
        after: Behind the line with this id; `None` is the last ones.
        attempt: Of this attempt alone.
        limit: At most so many.
    """

    job_id: str
    after: int | None = None
    attempt: int | None = None
    limit: int | None = None


def wants_text(accept: str | None) -> bool:
    """Tell whether an Accept header asks for plain text rather than JSON."""
    lowered = (accept or "").lower()
    return "text/plain" in lowered and "application/json" not in lowered


def log_page(services: Services, principal: Principal, query: LogQuery) -> LogPage:
    """Return lines, oldest first."""
    with services.database.session() as session:
        return jobs.read_log(
            session,
            principal,
            query.job_id,
            after=query.after,
            attempt=query.attempt,
            limit=query.limit or _LINES,
        )


def log_text(services: Services, principal: Principal, query: LogQuery) -> Response:
    """Return lines as plain text; without a limit all that are kept.

    Raises:
        NotFound: Code `unknown_job`.
    """
    if query.limit is not None:
        page = log_page(services, principal, query)
        return Response(_text(page), media_type="text/plain")
    first = log_page(services, principal, _from(query, query.after or 0))

    def texts() -> Iterator[str]:
        page = first
        if not query.after and page.dropped_bytes:
            yield f"… {page.dropped_bytes} bytes before this are no longer kept\n"
        while True:
            yield _text(page)
            if page.next_cursor is None:
                return
            page = log_page(services, principal, _from(query, int(page.next_cursor)))

    return StreamingResponse(texts(), media_type="text/plain")


def follow_log(
    services: Services, principal: Principal, query: LogQuery, last_event_id: str | None
) -> Response:
    """Return the live stream of a job's lines, from behind the last one that the client has.

    Raises:
        NotFound: Code `unknown_job`.
        InvalidInput: Code `invalid_event_id`.
    """
    resuming = last_event_id is not None and last_event_id.strip() != ""
    if resuming:
        query = _from(query, _line_id(str(last_event_id)))
    first = log_page(services, principal, query)
    if resuming and not first.data and first.complete:
        # A browser would otherwise reconnect for ever to a stream that has nothing to say.
        return Response(status_code=204)
    return EventStream(_lines(services, principal, query, first))


async def _lines(
    services: Services, principal: Principal, query: LogQuery, page: LogPage
) -> AsyncGenerator[bytes, None]:
    query = _from(query, query.after or 0)
    while not services.stopping.is_set():
        for line in page.data:
            query = _from(query, line.id)
            yield encode_event(line.model_dump_json(), event="line", id=str(line.id))
        if page.complete:
            return
        if page.next_cursor is None:
            # Another process writes the lines, so there is nothing to wait on but the clock.
            await asyncio.sleep(POLL_SECONDS)
        try:
            page = await run_in_threadpool(log_page, services, principal, query)
        except NotFound:
            return  # Deleted while it was followed.


def _from(query: LogQuery, line_id: int) -> LogQuery:
    return replace(query, after=line_id, limit=_LINES_PER_LOOK)


def _text(page: LogPage) -> str:
    return "".join(f"{line.text}\n" for line in page.data)


def _line_id(value: str) -> int:
    text = value.strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise InvalidInput(
            "Last-Event-ID must be the id of a line",
            code="invalid_event_id",
            field="Last-Event-ID",
        )
    return int(text)

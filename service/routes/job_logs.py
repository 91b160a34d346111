"""Jobs: what the trainer wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request

from core.reads import LogPage
from service import job_feeds, log_feeds
from service.auth import Reader
from service.deps import ServicesDep
from service.openapi import problems

router = APIRouter(prefix="/jobs", tags=["jobs"])

_LINE = (
    '{"loss":1.92,"step":12,"event":"measured","job_id":"job-01k9…","attempt":2,"level":"info",'
    '"logger":"core.training.journal","process":"trainer","timestamp":"2026-11-24T14:02:11Z"}'
)
_PAGE_EXAMPLE: dict[str, Any] = {
    "data": [{"id": 5120, "attempt": 2, "created_at": "2026-11-24T14:02:11.204Z", "text": _LINE}],
    "next_cursor": None,
    "dropped_bytes": 0,
    "complete": False,
}


@router.get(
    "/{job_id}/logs",
    summary="Read or follow a job's log",
    response_model=LogPage,
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "description": "A page; by `Accept: text/plain` or `?format=text` the lines as they "
            "are; with `Accept: text/event-stream` a live stream.",
            "content": {
                "application/json": {"example": _PAGE_EXAMPLE},
                "text/plain": {"example": _LINE + "\n"},
                "text/event-stream": {
                    "example": 'event: line\ndata: {"id":5120,"attempt":2,"text":"…"}\nid: 5120\n\n'
                },
            },
        },
        204: {"description": "The job has ended and nothing comes after Last-Event-ID."},
    },
)
def job_logs(
    job_id: str,
    request: Request,
    services: ServicesDep,
    principal: Reader,
    format: Annotated[  # noqa: A002
        Literal["json", "text"] | None, Query(description="Overrides the Accept header.")
    ] = None,
    after: Annotated[
        int | None,
        Query(ge=0, le=2**53 - 1, description="Only lines behind the one with this id."),
    ] = None,
    attempt: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="One attempt.")] = None,
    limit: Annotated[
        int | None,
        Query(ge=1, le=10_000, description="Lines; 200 by default, all for plain text."),
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="Where a broken stream goes on.")
    ] = None,
) -> Any:
    """Return the last lines that a job's trainer wrote, or those behind `after`; or follow them.

    They are the trainer's structured lines and whatever libraries print, of all attempts, as they
    were written but for secrets, which read `[redacted]`. Lines appear within a second, and those
    of a trainer that was killed are kept to the last. Of a long log the newest are kept;
    `dropped_bytes` says how much is missing before them. `complete` says that nothing follows.
    """
    accept = request.headers.get("accept")
    query = log_feeds.LogQuery(job_id, after, attempt, limit)
    if format is None and job_feeds.wants_stream(accept):
        return log_feeds.follow_log(services, principal, query, last_event_id)
    if format == "text" or (format is None and log_feeds.wants_text(accept)):
        return log_feeds.log_text(services, principal, query)
    return log_feeds.log_page(services, principal, query)

"""Jobs: submit and watch; what moves them is in `job_control`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Body, Header, Query, Request, Response, status

from core import jobs
from core.job_status import JobStatus
from core.reads import CheckpointRead, EventRead, JobRead, MetricRead, Page
from core.specs import JobSpec
from service import job_feeds, report_page
from service.auth import Reader, Trainer
from service.deps import CheckedBody, Cursor, Limit, ReadSession, ServicesDep
from service.openapi import problems

router = APIRouter(prefix="/jobs", tags=["jobs"])

_SPEC_EXAMPLES: dict[str, Any] = {
    "least": {"value": {"base_model": "smollm2-135m-instruct", "dataset": "file-01k9…"}},
    "usual": {
        "value": {
            "base_model": "smollm2-135m-instruct",
            "dataset": "file-01k9…",
            "adapter": "support-bot",
            "lora": {"r": 16, "alpha": 32},
            "training": {"epochs": 3, "batch_size": 2, "learning_rate": 2e-4, "seed": 7},
            "data": {"validation_fraction": 0.1},
            "metadata": {"team": "support"},
        }
    },
}

_REPORT_EXAMPLE: dict[str, Any] = {
    "samples": [
        {
            "prompt": "Where is my parcel?",
            "messages": [{"role": "user", "content": "Where is my parcel?"}],
            "reference": "It left our depot this morning.",
            "base": "I am not able to track parcels.",
            "adapter": "It left our depot this morning.",
        }
    ],
    "sampling": {
        "max_new_tokens": 64,
        "temperature": 0.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": 7,
    },
    "base_eval_loss": 2.31,
    "eval_loss": 1.12,
    "evaluation": {
        "rows": 40,
        "tokens": 1210,
        "base": {"loss": 2.31, "perplexity": 10.07},
        "adapter": {"loss": 1.12, "perplexity": 3.06},
        "loss_change": {"mean": -1.19, "low": -1.31, "high": -1.07},
        "confidence": 0.95,
        "resamples": 2000,
    },
    "scores": {
        "answers": 1,
        "base": {"exact_match": 0.0, "rouge_l": 0.0},
        "adapter": {"exact_match": 1.0, "rouge_l": 1.0},
    },
    "forgetting": {
        "tokens": 1480,
        "base": {"loss": 2.9, "perplexity": 18.17},
        "adapter": {"loss": 2.94, "perplexity": 18.92},
        "loss_change": 0.04,
    },
    "verdict": {"better": True, "compared_with": "base", "reasons": []},
    "train_loss": 0.98,
    "training_rows": 360,
    "validation_rows": 40,
    "trainable_parameters": 4_884_480,
    "total_parameters": 139_399_488,
}


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Start a fine-tuning job",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 409, 413, 422, 429),
)
def submit_job(
    spec: Annotated[JobSpec, Body(openapi_examples=_SPEC_EXAMPLES)],
    response: Response,
    background: BackgroundTasks,
    services: ServicesDep,
    principal: Trainer,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key with the same body answers with the same job."),
    ] = None,
) -> JobRead:
    """Accept a job; it is validated first, then queued, then trained.

    With an `Idempotency-Key` a repeated request starts nothing new: the same body answers with the
    first job, another body is refused with `idempotency_key_reused`. When the project has as many
    jobs waiting as it may, the answer is 429 `quota_exceeded`; `limit` names the quota.
    """
    job, created = jobs.accept(
        services.database,
        principal,
        spec,
        settings=services.settings,
        idempotency_key=idempotency_key,
        store=services.store,
    )
    if created:
        # Runs when the answer has left, hence after the commit.
        background.add_task(services.queue.wake, "light")
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.get("", summary="List jobs", responses=problems(401, 403, 422))
def list_jobs(
    session: ReadSession,
    principal: Reader,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this status.")] = None,
    adapter: Annotated[str | None, Query(max_length=128, description="Adapter name.")] = None,
    base_model: Annotated[str | None, Query(max_length=128, description="Base model.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[JobRead]:
    """Return jobs, newest first."""
    return jobs.list_jobs(
        session,
        principal,
        status=status,
        adapter=adapter,
        base_model=base_model,
        cursor=cursor,
        limit=limit,
    )


@router.get("/{job_id}", summary="Read a job", responses=problems(401, 403, 404))
def get_job(job_id: str, session: ReadSession, principal: Reader, services: ServicesDep) -> JobRead:
    """Return a job's status, progress and error.

    While it waits, `progress` has its place in the queue, an estimate of when it starts and ends,
    and `waiting_reason` when no worker can take it as things are.
    """
    return jobs.get(session, principal, job_id, settings=services.settings)


@router.get(
    "/{job_id}/events",
    summary="Read or follow a job's events",
    response_model=Page[EventRead],
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "description": "A page, or with `Accept: text/event-stream` a live stream.",
            "content": {
                "text/event-stream": {
                    "example": 'event: queued\ndata: {"id":2,"type":"queued"}\nid: 2\n\n'
                }
            },
        },
        204: {"description": "The stream has ended and there is nothing after Last-Event-ID."},
    },
)
def job_events(
    job_id: str,
    request: Request,
    services: ServicesDep,
    principal: Reader,
    after: Annotated[
        int, Query(ge=0, le=2**31 - 1, description="Only events with a larger id.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events per page.")] = 100,
    last_event_id: Annotated[
        str | None, Header(description="Where a broken stream goes on.")
    ] = None,
) -> Any:
    """Return events as a JSON page, or follow them live.

    With `Accept: text/event-stream` the events come as they happen and the stream ends after the
    terminal one. Event ids are sequence numbers; a client that lost its connection sends the last
    one as `Last-Event-ID` and misses nothing.
    """
    if job_feeds.wants_stream(request.headers.get("accept")):
        return job_feeds.follow(services, principal, job_id, after, last_event_id)
    return job_feeds.event_page(services, principal, job_id, after, limit)


@router.get(
    "/{job_id}/metrics",
    summary="Read a job's metrics",
    response_model=Page[MetricRead],
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "description": "A page, or CSV by `Accept: text/csv` or `?format=csv`.",
            "content": {"text/csv": {"example": "attempt,step,epoch,loss\n1,1,0.1,2.31\n"}},
        },
    },
)
def job_metrics(
    job_id: str,
    request: Request,
    services: ServicesDep,
    principal: Reader,
    format: Annotated[  # noqa: A002
        Literal["json", "csv"] | None, Query(description="Overrides the Accept header.")
    ] = None,
    attempt: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="One attempt.")] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Rows per page.")] = 1000,
) -> Any:
    """Return loss, learning rate, gradient norm and speed by step; CSV holds all rows."""
    if format == "csv" or (format is None and job_feeds.wants_csv(request.headers.get("accept"))):
        return job_feeds.metrics_csv(services, principal, job_id, attempt)
    return job_feeds.metrics_page(services, principal, job_id, attempt, cursor, limit)


@router.get(
    "/{job_id}/report",
    summary="Read a job's report",
    response_model=dict[str, Any],
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "description": "JSON, or a page by `Accept: text/html` or `?format=html`.",
            "content": {
                "application/json": {"example": _REPORT_EXAMPLE},
                "text/html": {"example": "<!doctype html>…"},
            },
        },
    },
)
def job_report(
    job_id: str,
    request: Request,
    session: ReadSession,
    principal: Reader,
    format: Annotated[  # noqa: A002
        Literal["json", "html"] | None, Query(description="Overrides the Accept header.")
    ] = None,
) -> Any:
    """Return what base and adapter answer and score on the same rows, once the job has succeeded.

    `verdict` is what `promote: if_better` goes by. Members that do not apply are `null` or absent:
    `evaluation` without validation rows, `scores` without references; `preferences` is there for
    dpo alone.
    """
    report = jobs.report(session, principal, job_id)
    accept = request.headers.get("accept")
    if format == "html" or (format is None and report_page.wants_page(accept)):
        job = jobs.get(session, principal, job_id)
        return report_page.report_page(job.model_dump(mode="json"), report)
    return report


@router.get(
    "/{job_id}/checkpoints", summary="List a job's checkpoints", responses=problems(401, 403, 404)
)
def job_checkpoints(job_id: str, session: ReadSession, principal: Reader) -> Page[CheckpointRead]:
    """Return the checkpoints that are kept, newest first; the next attempt takes the first usable.

    One that is not usable was found damaged; `reason` says how.
    """
    return jobs.checkpoints(session, principal, job_id)

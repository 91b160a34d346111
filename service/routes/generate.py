"""Answers from the base model or from an adapter on it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from service import generation
from service.auth import Generator
from service.deps import CheckedBody, ServicesDep
from service.openapi import problems
from service.schemas import GenerateAnswer, GenerateBody
from service.streaming import EventStream, until_disconnect

router = APIRouter(tags=["generate"])

_STREAM_EXAMPLE = (
    'event: delta\ndata: {"index":0,"text":"Your parcel"}\n\n'
    'event: done\ndata: {"id":"gen-01k9…","finish_reason":"stop"}\n\n'
)


@router.post(
    "/generate",
    summary="Generate text",
    response_model=GenerateAnswer,
    dependencies=[CheckedBody],
    responses={
        **problems(400, 401, 403, 404, 409, 413, 422, 429, 503),
        200: {
            "description": "The answer; with `stream` server-sent events `delta`, `done`, `error`.",
            "content": {"text/event-stream": {"example": _STREAM_EXAMPLE}},
        },
    },
)
async def generate(
    body: GenerateBody,
    request: Request,
    services: ServicesDep,
    principal: Generator,
    adapter: Annotated[
        str | None,
        Query(
            max_length=200,
            description="`NAME` (its alias latest), `NAME@VERSION` or `NAME:alias`; "
            "the base model answers without it.",
        ),
    ] = None,
) -> Any:
    """Answer a prompt or a conversation, with the named adapter on the shared base model.

    The adapter is loaded on first use. Its name, version and digest are in the answer; a request
    for an adapter is never answered by the base model instead. Closing the connection cancels it.
    """
    target = await run_in_threadpool(
        generation.resolve_target, services, principal, adapter, body.base_model
    )
    asked = generation.engine_request(body, target, principal)
    tally = generation.Tally(asked.request_id, target, body.logprobs is not None)
    if not body.stream:
        return await until_disconnect(request, generation.complete(services, asked, tally))
    events = await until_disconnect(request, generation.start(services, asked))
    return EventStream(
        generation.stream(
            events, tally, instance=request.url.path, request_id=request.state.request_id
        )
    )

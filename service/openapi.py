"""What the OpenAPI document says beyond the signatures: problems, upload bodies, tags."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from service.errors import PROBLEM_MEDIA_TYPE
from service.schemas import Problem

DESCRIPTION = """\
Fine-tune small adapters and serve all of them from one base model.

`POST /datasets`, then `POST /jobs`, follow `GET /jobs/{id}/events`, then
`POST /generate?adapter=NAME`.

Errors are `application/problem+json` with a stable `code`, the offending field or line and a hint.
Lists answer `{"data": […], "next_cursor": …}`; pass `next_cursor` as `cursor` for the next page.
"""

TAGS = [
    {"name": "datasets", "description": "Training rows."},
    {"name": "jobs", "description": "Fine-tuning jobs and their progress."},
    {"name": "adapters", "description": "What jobs publish: names, versions, aliases."},
    {"name": "webhooks", "description": "Messages to your own services when something happens."},
    {"name": "generate", "description": "Answers from the base model or an adapter."},
    {"name": "models", "description": "Base models."},
    {"name": "operations", "description": "Health, metrics, engine and workers."},
]

_MEANINGS = {
    400: "The body is not JSON.",
    401: "No valid API key.",
    403: "The key lacks the scope, host or origin are not allowed, or a quota is reached.",
    404: "No such object in the caller's project.",
    409: "The object's state refuses the request.",
    413: "The request is larger than allowed.",
    422: "A field, line or file is invalid; `field`, `line` and `errors` say where.",
    429: "The engine is full, or a quota reached; retry after `Retry-After` seconds.",
    503: "A part of the service is unavailable; retry after `Retry-After` seconds.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of error answers, for a route's `responses`."""
    return {
        status: {
            "description": f"{HTTPStatus(status).phrase}: {_MEANINGS[status]}",
            "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({*statuses, 503} if 401 in statuses else statuses)
    }


def upload_body(media_type: str, example: str | None) -> dict[str, Any]:
    """Return the documentation of a body that is one file."""
    raw: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    if example is not None:
        raw["example"] = example
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, media_type: raw},
        }
    }


def complete_document(document: dict[str, Any]) -> None:
    """Add the schema of problems, and let it replace the framework's own error schemas."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    documented = problems(422)[422]
    for operations in document["paths"].values():
        for operation in operations.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                operation["responses"]["422"] = documented

"""Dry runs of job specs: everything but the training."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response, status

from core import jobs
from core.reads import DryRunRead
from core.specs import JobSpec
from service import dry_runs
from service.auth import Reader, Trainer
from service.deps import CheckedBody, ReadSession, ServicesDep
from service.openapi import problems

router = APIRouter(prefix="/jobs", tags=["jobs"])

_SPEC_EXAMPLES: dict[str, Any] = {
    "a data set": {
        "value": {
            "base_model": "smollm2-135m-instruct",
            "dataset": "file-01k9…",
            "training": {"epochs": 3, "max_length": 512},
            "data": {"validation_fraction": 0.1, "min_chars": {"assistant": 20}},
        }
    },
    "inline rows": {
        "value": {
            "base_model": "smollm2-135m-instruct",
            "rows": [{"prompt": "Who are you?", "completion": "The support bot."}],
        }
    },
}
_INVALID_EXAMPLE: dict[str, Any] = {
    "id": "validation-01k9…",
    "status": "succeeded",
    "valid": False,
    "report": {
        "valid": False,
        "format": "messages",
        "rows_read": 120,
        "rows": 119,
        "dropped": {},
        "error_count": 1,
        "errors": [
            {
                "line": 17,
                "field": None,
                "code": "row_too_long",
                "message": "the row has 1,730 tokens and the limit is 512. Shorten it, or …",
            }
        ],
        "too_long": {"rows": 1, "longest_tokens": 1730, "limit_tokens": 512},
        "training_rows": 107,
        "validation_rows": 12,
        "steps": 81,
        "tokens_per_epoch": 9816,
        "total_tokens": 29448,
        "warnings": [
            {
                "code": "duplicate_rows",
                "message": "1 rows say exactly the same as an earlier one",
                "lines": [64],
            }
        ],
    },
    "estimate": {
        "device": "cpu",
        "seconds": 74.2,
        "tokens_per_second": 431.0,
        "measured_jobs": 3,
        "peak_memory_bytes": 1_203_000_000,
    },
}


@router.post(
    "/validate",
    summary="Check a spec and its rows without training",
    response_model=DryRunRead,
    dependencies=[CheckedBody],
    responses={
        **problems(400, 401, 403, 413, 422, 429),
        200: {
            "description": "The report; `valid` is false when a job would be refused.",
            "content": {"application/json": {"example": _INVALID_EXAMPLE}},
        },
        202: {
            "description": "It takes longer; `Location` names where the report will be.",
            "model": DryRunRead,
        },
    },
)
async def validate_job(
    spec: Annotated[JobSpec, Body(openapi_examples=_SPEC_EXAMPLES)],
    response: Response,
    services: ServicesDep,
    principal: Trainer,
    wait_seconds: Annotated[
        float, Query(ge=0, le=10, description="How long the answer may wait for the report.")
    ] = 10.0,
) -> DryRunRead:
    """Do everything that `POST /jobs` does with the spec, but the training.

    The base model, the data set and the target modules must exist, as for a job. Then every row is
    read, checked, rendered and masked with the base model's tokenizer. The report names all errors
    by line, what the filters leave out, duplicates and rows that are both in the training and in
    the validation set, token counts, the steps, one rendered row with the parts that are learnt,
    and an estimate of time and memory. No job, no data set and no quota comes of it.
    """
    found = await dry_runs.start_and_wait(services, principal, spec, wait_seconds)
    if found.status == "validating":
        response.status_code = status.HTTP_202_ACCEPTED
    response.headers["Location"] = f"/jobs/validations/{found.id}"
    return found


@router.get(
    "/validations/{validation_id}",
    summary="Read the report of a validation",
    responses=problems(401, 403, 404),
)
def get_validation(validation_id: str, session: ReadSession, principal: Reader) -> DryRunRead:
    """Return a validation, with its report once there is one; it is kept for a day."""
    return jobs.get_dry_run(session, principal, validation_id)

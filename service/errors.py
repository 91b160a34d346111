"""How an error becomes HTTP: status by kind, body as `application/problem+json` (RFC 9457).

The only module of the service that knows which status an error has. Never echoes internals: what is
not a deliberate error answers `internal_error` and goes to the log.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from sqlalchemy import exc as database_errors
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from core.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    QuotaExceeded,
    TooLarge,
    TunesmithError,
    Unauthorized,
    Unavailable,
)
from core.logging import get_logger
from service.validation import describe_invalid_request

PROBLEM_MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499

# The first match wins, so subclasses come before their parents.
_STATUS_BY_KIND: tuple[tuple[type[TunesmithError], int], ...] = (
    (TooLarge, 413),
    (InvalidInput, 422),
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Unavailable, 503),
)
_STATUS_BY_CODE = {
    "invalid_json": 400,
    "engine_full": 429,
    "method_not_allowed": 405,
    "deadline_exceeded": 504,
}

log = get_logger(__name__)


def status_of(error: TunesmithError) -> int:
    """Return the HTTP status of a deliberate error; 500 for kinds that no client can cause."""
    if error.code in _STATUS_BY_CODE:
        return _STATUS_BY_CODE[error.code]
    if isinstance(error, QuotaExceeded):
        # What frees itself is worth another try, what somebody must free is not.
        return 403 if error.retry_after_seconds is None else 429
    return next((status for kind, status in _STATUS_BY_KIND if isinstance(error, kind)), 500)


def problem(error: TunesmithError, *, instance: str, request_id: str | None) -> dict[str, Any]:
    """Return the members of the problem document for `error`.

    Args:
        error: What went wrong.
        instance: Path of the request.
        request_id: Id under which the log knows the request.
    """
    status = status_of(error)
    members = error.as_dict()
    detail = members.pop("message")
    return {
        "type": f"urn:tunesmith:problem:{error.code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
        "instance": instance,
        "request_id": request_id,
    }


def headers_of(error: TunesmithError) -> dict[str, str]:
    """Return the response headers that belong to `error`."""
    status = status_of(error)
    if status == 401:
        return {"WWW-Authenticate": 'Bearer realm="tunesmith"'}
    if status in (429, 503):
        return {"Retry-After": str(getattr(error, "retry_after_seconds", 2))}
    return {}


def problem_response(
    error: TunesmithError,
    *,
    instance: str,
    request_id: str | None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the HTTP response for `error`; always encodable, whatever the client sent."""
    members = problem(error, instance=instance, request_id=request_id)
    # ASCII: a lone surrogate that a message quotes must not break the answer.
    body = json.dumps(members, ensure_ascii=True, default=str).encode("ascii")
    return Response(
        body,
        status_code=status_of(error),
        media_type=PROBLEM_MEDIA_TYPE,
        headers={**headers_of(error), **(headers or {})},
    )


def public_error(error: TunesmithError) -> TunesmithError:
    """Return what a client may know of an error; what it could not cause is logged and hidden."""
    if status_of(error) < 500 or error.retryable:
        return error
    log.error("request_failed", code=error.code, exc_info=error)
    return internal_error()


def internal_error() -> TunesmithError:
    """Return the error that stands for any failure of ours."""
    return TunesmithError(
        "the service failed to handle this request",
        code="internal_error",
        hint="Report the request_id to the operator; the log has the details.",
    )


def install(app: FastAPI) -> None:
    """Register the handlers; what they do not cover is caught by `RequestMiddleware`."""
    app.add_exception_handler(TunesmithError, _deliberate)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(database_errors.SQLAlchemyError, _database_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(OSError, _os_error)


def _respond(
    request: Request, error: TunesmithError, headers: Mapping[str, str] | None = None
) -> Response:
    return problem_response(
        error,
        instance=request.url.path,
        request_id=request.scope.get("state", {}).get("request_id"),
        headers=headers,
    )


def _deliberate(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunesmithError)
    return _respond(request, public_error(error))


def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(request, describe_invalid_request(error, request.scope.get("route")))


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # The framework names the methods of the first of several routes at the path.
        error.headers = {"Allow": ", ".join(_allowed_methods(request))}
    return _respond(request, _from_http_exception(request, error), error.headers)


def _allowed_methods(request: Request) -> list[str]:
    allowed: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.methods and route.path_regex.match(request.url.path):
            allowed |= route.methods
    return sorted(allowed)


def _from_http_exception(request: Request, error: HTTPException) -> TunesmithError:
    """Translate what the framework raises by itself."""
    if error.status_code == 404:
        return NotFound(
            f"there is nothing at {request.url.path}",
            code="unknown_path",
            hint="GET /openapi.json lists every path.",
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return InvalidInput(
            f"{request.method} is not possible here",
            code="method_not_allowed",
            hint=f"Allowed: {allowed}." if allowed else None,
        )
    if error.status_code == 413:
        return TooLarge(
            str(error.detail), hint="Send less, or ask the operator to raise the limit."
        )
    if error.status_code == 400:
        return InvalidInput(_unreadable_body(error.__cause__), code="invalid_json")
    return TunesmithError(str(error.detail), code="http_error")


def _unreadable_body(cause: BaseException | None) -> str:
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: bad byte at position {cause.start}"
    if isinstance(cause, ValueError):
        return "the body holds a number with too many digits"
    return "the body cannot be read"


def _database_error(request: Request, error: Exception) -> Response:
    unreachable = (
        database_errors.OperationalError,
        database_errors.InterfaceError,
        database_errors.TimeoutError,
    )
    # The bare class is what SQLite says of a file that is damaged or no database.
    if isinstance(error, unreachable) or type(error) is database_errors.DatabaseError:
        log.error("database_unavailable", exc_info=error)
        return _respond(
            request,
            Unavailable(
                "the database cannot be used at the moment",
                code="database_unavailable",
                hint="Retry; GET /readyz tells what is missing.",
                retry_after_seconds=5,
            ),
        )
    if isinstance(error, database_errors.DataError):
        log.warning("unstorable_value", exc_info=error)
        return _respond(
            request, InvalidInput("a value of the request cannot be stored", code="invalid_request")
        )
    log.error("request_failed", exc_info=error)
    return _respond(request, internal_error())


def _client_gone(request: Request, error: Exception) -> Response:
    """Answer nobody; the status only shows in the log and the metrics."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _os_error(request: Request, error: Exception) -> Response:
    log.error("request_failed", exc_info=error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _respond(
            request,
            Unavailable(
                "the service has no disk space left", code="storage_full", retry_after_seconds=60
            ),
        )
    return _respond(request, internal_error())

"""What happens around every request: its id, its log line, its limits and who may ask from where.

Plain ASGI: these classes see streams and disconnects as they are. They know no route and no domain
object; a refusal is the same problem document that a route's error is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.config import Settings
from core.errors import Forbidden, InvalidInput, TooLarge, TunesmithError
from core.ids import new_id
from core.logging import bind, get_logger
from service import metrics
from service.errors import internal_error, problem_response

UNMATCHED_ROUTE = "unmatched"
# Probes come by address, and what they learn is no secret.
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}

log = get_logger(__name__)


class RequestMiddleware:
    """Give each request an id, one log line and its metrics; answer 500 for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _REQUEST_ID.match(offered) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with bind(request_id=request_id):
            try:
                await self.app(scope, receive, send_marked)
            except Exception:
                log.exception("request_failed")
                if status:
                    raise  # Cut the connection: half an answer must not look complete.
                response = problem_response(
                    internal_error(), instance=scope["path"], request_id=request_id
                )
                await response(scope, receive, send_marked)
            finally:
                self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        template = getattr(scope.get("route"), "path", UNMATCHED_ROUTE)
        metrics.observe_request(template, scope["method"], status, seconds)
        # Neither the query string nor the path's own values: they may name a tenant's objects.
        log.info(
            "request",
            method=scope["method"],
            route=template,
            status=status,
            duration_ms=round(seconds * 1000, 1),
        )


class GuardMiddleware:
    """Refuse what no route should see: foreign hosts and origins, NUL characters in the URL.

    Without API keys everything that reaches the port may act, so a web page that the user visits
    must not: its requests carry its own Origin, or a Host of its own after DNS rebinding.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._check_sender = settings.auth == "none"
        self._hosts = _split(settings.allowed_hosts)
        self._origins = _split(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await _refuse(refusal, scope, receive, send)

    def _refusal(self, scope: Scope) -> TunesmithError | None:
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return InvalidInput("the URL holds a NUL character", code="invalid_text")
        if not self._check_sender or scope["path"] in _OPEN_PATHS:
            return None
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            return Forbidden(
                "requests to this host name are not accepted",
                code="host_not_allowed",
                hint="Add the name to TUNESMITH_ALLOWED_HOSTS, or turn API keys on.",
            )
        if scope["method"] not in _SAFE_METHODS and not self._is_own_page(headers, host):
            return Forbidden(
                "writes from this origin are not accepted",
                code="origin_not_allowed",
                hint="Add the origin to TUNESMITH_ALLOWED_ORIGINS, or turn API keys on.",
            )
        return None

    def _is_own_page(self, headers: Headers, host: str) -> bool:
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        return origin.lower() in self._origins or urlsplit(origin).netloc.lower() == host.lower()


class BodyLimitMiddleware:
    """Bound the size of request bodies, announced or not.

    Args:
        app: What to protect.
        default_bytes: Limit of every path that is not in `limits`.
        limits: Other limits, by path.
    """

    def __init__(self, app: ASGIApp, default_bytes: int, limits: Mapping[str, int]) -> None:
        self.app = app
        self._default_bytes = default_bytes
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._limits.get(scope["path"], self._default_bytes)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit:
            await _refuse(_too_large(limit), scope, receive, send)
            return

        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # Of this kind because FastAPI wraps all others, while it reads a body, into a 400.
                raise HTTPException(413, _too_large(limit).message)
            return message

        await self.app(scope, receive_counted, send)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the request has more than {limit:,} bytes",
        hint="Send less, or ask the operator to raise the limit.",
    )


async def _refuse(error: TunesmithError, scope: Scope, receive: Receive, send: Send) -> None:
    response = problem_response(
        error, instance=scope["path"], request_id=scope["state"]["request_id"]
    )
    await response(scope, receive, send)


def _split(listing: str) -> frozenset[str]:
    return frozenset(part.strip().lower() for part in listing.split(",") if part.strip())


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port; IPv6 addresses keep their brackets."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower().rstrip(".")

"""The HTTP client of the commands: where the service is, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from core.errors import InvalidInput, TunesmithError, Unavailable

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL = "http://127.0.0.1:8000"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_PAGE_ROWS = 100

Url = Annotated[str, typer.Option("--url", envvar="TUNESMITH_URL", help="Where the service is.")]
Key = Annotated[
    str,
    typer.Option(
        "--key", envvar="TUNESMITH_API_KEY", help="API key.", show_default=False, show_envvar=True
    ),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Show at most so many, newest first.")]


class ServiceClient:
    """One service, as the commands see it: JSON in and out, errors as `TunesmithError`.

    Args:
        url: Base URL.
        key: API key; empty for a service without keys.
        transport: Another way to the service, for tests.
    """

    def __init__(self, url: str, key: str = "", transport: httpx2.BaseTransport | None = None):
        import httpx2

        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidInput(
                f"{url!r} is no http URL", code="invalid_url", hint=f"For example {DEFAULT_URL}."
            )
        self.url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(600, connect=10),
            # A proxy for the outside world cannot reach this machine's loopback.
            trust_env=parts.hostname not in _LOOPBACK,
            transport=transport,
        )

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Send a request and return the JSON of its answer; `None` when it has no body.

        Args:
            method: HTTP method.
            path: Path below the base URL.
            options: As of `httpx2.Client.request`.

        Raises:
            TunesmithError: The service refused, or cannot be reached.
        """
        with self._translated():
            response = self._http.request(method, path, **options)
            raise_for_problem(response)
            if not response.content:
                return None
            return _json_of(response)

    def upload(self, path: str, file: Path, **params: str) -> Any:
        """Send a file as multipart field `file`; returns and raises as `call`."""
        with file.open("rb") as stream:
            return self.call("POST", path, params=params, files={"file": (file.name, stream)})

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        """Send a request and give its answer before the body is read; errors as in `call`."""
        with self._translated(), self._http.stream(method, path, **options) as response:
            if not response.is_success:
                response.read()
                raise_for_problem(response)
            yield response

    @contextmanager
    def events(self, method: str, path: str, **options: Any) -> Iterator[httpx2.EventSource]:
        """Send a request and give the server-sent events of its answer; errors as in `call`."""
        import httpx2

        headers = {"Accept": "text/event-stream", **options.pop("headers", {})}
        with self.stream(method, path, headers=headers, **options) as response:
            yield httpx2.EventSource(response)

    def list(self, path: str, limit: int, **params: Any) -> list[dict[str, Any]]:
        """Return up to `limit` entries of a paged list."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            page = self.call(
                "GET",
                path,
                params={
                    **{name: value for name, value in params.items() if value is not None},
                    "limit": min(_PAGE_ROWS, limit - len(found)),
                    **({"cursor": cursor} if cursor else {}),
                },
            )
            found += page["data"]
            cursor = page["next_cursor"]
            if cursor is None or len(found) >= limit:
                return found[:limit]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except httpx2.ConnectError as error:
            raise Unavailable(
                f"no service answers at {self.url}",
                code="service_unreachable",
                hint="Start one with `tunesmith serve`, or name another with --url or "
                "TUNESMITH_URL.",
            ) from error
        except httpx2.HTTPError as error:
            raise Unavailable(
                f"the connection to {self.url} failed: {error or type(error).__name__}",
                code="connection_failed",
            ) from error


def connect(url: str, key: str) -> ServiceClient:
    """Return a client of the service at `url`."""
    return ServiceClient(url, key)


def raise_for_problem(response: httpx2.Response) -> None:
    """Raise the error that a response tells of, if any."""
    if response.is_success:
        return
    try:
        members = response.json()
    except ValueError:
        members = None
    if not isinstance(members, dict) or "code" not in members:
        raise TunesmithError(
            f"the answer was HTTP {response.status_code} and not one of Tunesmith's",
            code="unexpected_answer",
            hint=f"Is {response.request.url} a Tunesmith service?",
        )
    hint = members.get("hint")
    if response.status_code == 401:
        hint = "Give a key with --key or TUNESMITH_API_KEY; `tunesmith keys create` makes one."
    raise TunesmithError(
        str(members.get("detail") or members.get("title")),
        code=str(members["code"]),
        hint=hint,
        field=members.get("field"),
        line=members.get("line"),
        errors=members.get("errors"),
    )


def _json_of(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise TunesmithError(
            "the answer is not JSON",
            code="unexpected_answer",
            hint=f"Is {response.request.url} a Tunesmith service?",
        ) from error

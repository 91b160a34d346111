"""Every error that Tunesmith raises on purpose.

Core knows stable codes and words; how a code becomes an HTTP status is known by `service/errors.py`
and the engine's server alone.

    TunesmithError
    ├── InvalidInput        the caller sent something wrong
    │   └── TooLarge        … and what is wrong is its size
    ├── Unauthorized        no valid API key
    ├── Forbidden           a valid key without the needed scope, or a refused origin
    ├── NotFound            no such object in the caller's project
    ├── Conflict            the object is in a state that refuses the request
    ├── QuotaExceeded       the project has as much as it may have
    ├── Unavailable         a part of the service is down or busy; retry later
    ├── TrainingFailed      a job ended without an adapter
    └── LeaseLost           a worker no longer owns the job it works on
"""

from __future__ import annotations

from typing import Any


class TunesmithError(Exception):
    """Base of all deliberate errors.

    Args:
        code: Stable snake_case identifier that clients may branch on.
        message: One sentence saying what is wrong.
        hint: What to do about it.
        field: Dotted path of the offending input field.
        line: 1-based line of the offending row in an uploaded file.
        errors: Further findings, each a mapping with its own message, field or line.
    """

    default_code = "error"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        field: str | None = None,
        line: int | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.field = field
        self.line = line
        self.errors = errors or []

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain JSON values, empty members left out."""
        members: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "field": self.field,
            "line": self.line,
            "errors": self.errors or None,
        }
        return {name: value for name, value in members.items() if value is not None}


class InvalidInput(TunesmithError):
    """The caller sent something that cannot be accepted."""

    default_code = "invalid_input"


class TooLarge(InvalidInput):
    """The caller sent more than a limit allows."""

    default_code = "too_large"


class Unauthorized(TunesmithError):
    """No valid API key came with the request."""

    default_code = "unauthorized"


class Forbidden(TunesmithError):
    """The key or origin may not do this."""

    default_code = "forbidden"


class NotFound(TunesmithError):
    """No such object, or one of another project: the two cannot be told apart."""

    default_code = "not_found"


class Conflict(TunesmithError):
    """The object's present state refuses the request."""

    default_code = "conflict"


class QuotaExceeded(TunesmithError):
    """The project has as much of something as it may have.

    Args:
        limit: Name of the quota.
        value: What it allows.
        used: What the project has at present.
        retry_after_seconds: When a retry makes sense, for what frees itself; `None` for what
            somebody has to free.
    """

    default_code = "quota_exceeded"

    def __init__(
        self,
        message: str,
        *,
        limit: str = "",
        value: int = 0,
        used: int = 0,
        retry_after_seconds: int | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.limit = limit
        self.value = value
        self.used = used
        self.retry_after_seconds = retry_after_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain JSON values, with the quota that was reached."""
        members = {
            **super().as_dict(),
            "limit": {"name": self.limit, "value": self.value, "used": self.used},
        }
        if self.retry_after_seconds is not None:
            members["retry_after_seconds"] = self.retry_after_seconds
        return members


class Unavailable(TunesmithError):
    """A part of the service is down or busy; the same request may work later.

    Args:
        retry_after_seconds: When a retry makes sense.
    """

    default_code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, retry_after_seconds: int = 2, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after_seconds = retry_after_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the error as plain JSON values, with the time to wait."""
        return {**super().as_dict(), "retry_after_seconds": self.retry_after_seconds}


class TrainingFailed(TunesmithError):
    """A job ended without an adapter."""

    default_code = "training_failed"


class LeaseLost(TunesmithError):
    """The job was handed to another attempt; this worker must stop and publish nothing."""

    default_code = "lease_lost"


_BY_KIND: dict[str, type[TunesmithError]] = {
    cls.__name__: cls
    for cls in (
        InvalidInput,
        TooLarge,
        Unauthorized,
        Forbidden,
        NotFound,
        Conflict,
        QuotaExceeded,
        Unavailable,
        TrainingFailed,
        LeaseLost,
    )
}


def to_wire(error: TunesmithError) -> dict[str, Any]:
    """Encode an error for another process of the service."""
    members = {"kind": type(error).__name__, **error.as_dict()}
    if isinstance(error, Unavailable):
        members["retry_after_seconds"] = error.retry_after_seconds
    return members


def from_wire(members: dict[str, Any]) -> TunesmithError:
    """Rebuild the error that `to_wire` encoded; unknown kinds become `TunesmithError`."""
    cls = _BY_KIND.get(str(members.get("kind")), TunesmithError)
    details = {name: members.get(name) for name in ("code", "hint", "field", "line", "errors")}
    if cls is Unavailable and "retry_after_seconds" in members:
        details["retry_after_seconds"] = int(members["retry_after_seconds"])
    if cls is QuotaExceeded:
        limit = members["limit"]
        details |= {"limit": limit["name"], "value": limit["value"], "used": limit["used"]}
        details["retry_after_seconds"] = members.get("retry_after_seconds")
    return cls(str(members.get("message", "unknown error")), **details)

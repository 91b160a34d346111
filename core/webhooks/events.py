"""What webhooks can be told of, and how a message about it looks.

A message is `{"type", "timestamp", "data"}`, the shape that Standard Webhooks names. Members are
only ever added: receivers are programs of others.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from core.db.models import AdapterVersion, Job

JOB_EVENTS: Final = {
    status: f"job.{status}" for status in ("succeeded", "failed", "cancelled", "paused")
}
ADAPTER_PUBLISHED: Final = "adapter.published"
TEST: Final = "webhook.test"
EVENTS: Final = (*JOB_EVENTS.values(), ADAPTER_PUBLISHED)
"""What a webhook can subscribe to."""

_ERROR_MEMBERS = ("code", "message", "hint", "field", "line")
_MAX_TEXT = 1000


def message(event: str, at: datetime, data: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a message.

    Args:
        event: Its type.
        at: When it happened.
        data: What happened.
    """
    instant = at.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {"type": event, "timestamp": instant, "data": data}


def job_data(job: Job, version: AdapterVersion | None) -> dict[str, Any]:
    """Return what is told of a job; the members are named as in `GET /jobs/{id}`."""
    published = None
    if version is not None:
        published = {
            "name": job.adapter_name,
            "version": version.version,
            "digest": version.digest,
        }
    return {
        "id": job.id,
        "status": job.status,
        "adapter": job.adapter_name,
        "base_model": job.base_model,
        "attempt": job.attempt,
        "error": _short_error(job.error),
        "version": published,
        "metadata": job.spec.get("metadata") or {},
    }


def adapter_data(name: str, version: AdapterVersion, *, promoted: bool) -> dict[str, Any]:
    """Return what is told of a published version; the members are named as in its own answer."""
    return {
        "adapter": name,
        "version": version.version,
        "digest": version.digest,
        "base_model": version.base_model,
        "origin": version.origin,
        "job_id": version.job_id,
        "promoted": promoted,
        "quarantine": version.quarantine,
    }


def _short_error(error: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an error without its list of further findings, which can be long."""
    if error is None:
        return None
    members = {name: error[name] for name in _ERROR_MEMBERS if error.get(name) is not None}
    return {
        name: value[:_MAX_TEXT] if isinstance(value, str) else value
        for name, value in members.items()
    }

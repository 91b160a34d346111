"""Messages, written in the transaction that they tell of: afterwards both are there, or neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, Job, Webhook, WebhookDelivery, utc_now
from core.db.repositories.webhooks import OutboxRepository
from core.ids import new_id
from core.webhooks import events


def tell_of_job(session: Session, job: Job) -> None:
    """Write a message for every webhook that wants to know the status a job has come to.

    Args:
        session: In which the job was changed.
        job: As it is after that.
    """
    event = events.JOB_EVENTS.get(job.status)
    if event is None:
        return
    outbox = OutboxRepository(session)
    _tell(
        outbox,
        job.project_id,
        event,
        lambda: events.job_data(job, outbox.find_version(job.version_id)),
    )


def tell_of_adapter(
    session: Session, name: str, version: AdapterVersion, *, promoted: bool
) -> None:
    """Write a message for every webhook that wants to know of published adapters.

    Args:
        session: In which the version was added.
        name: The adapter.
        version: What was published.
        promoted: Whether it is the latest now.
    """
    _tell(
        OutboxRepository(session),
        version.project_id,
        events.ADAPTER_PUBLISHED,
        lambda: events.adapter_data(name, version, promoted=promoted),
    )


def tell(session: Session, webhook: Webhook, event: str, data: dict[str, Any]) -> WebhookDelivery:
    """Write a message for one webhook, whatever it subscribed to."""
    return OutboxRepository(session).add(_delivery(webhook, event, data))


def _tell(
    outbox: OutboxRepository, project_id: str, event: str, data: Callable[[], dict[str, Any]]
) -> None:
    wanted = [hook for hook in outbox.list_enabled(project_id) if event in hook.events]
    if wanted:
        content = data()
        for webhook in wanted:
            outbox.add(_delivery(webhook, event, content))


def _delivery(webhook: Webhook, event: str, data: dict[str, Any]) -> WebhookDelivery:
    now = utc_now()
    return WebhookDelivery(
        id=new_id("msg"),
        project_id=webhook.project_id,
        webhook_id=webhook.id,
        event=event,
        payload=events.message(event, now, data),
        status="pending",
        attempts=0,
        created_at=now,
    )

"""What the owner of a webhook does: create, change, test it, look at deliveries, replay them."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from core.config import Settings
from core.db.models import Webhook
from core.db.repositories.webhooks import OutboxRepository, WebhookRepository
from core.errors import Conflict, InvalidInput
from core.ids import new_id
from core.principal import Principal
from core.reads import Page, decode_cursor, encode_cursor
from core.webhooks import outbox
from core.webhooks.delivery import DISABLED
from core.webhooks.events import EVENTS, TEST
from core.webhooks.reads import (
    DeliveryRead,
    WebhookRead,
    WebhookWithSecret,
    delivery_read,
    webhook_read,
)

MAX_WEBHOOKS = 20
SECRET_OVERLAP_SECONDS = 86_400.0
_SECRET_BYTES = 32


def create(
    session: Session,
    principal: Principal,
    *,
    url: str,
    events: Sequence[str] | None,
    settings: Settings,
) -> WebhookWithSecret:
    """Add a webhook, with the secret that cannot be had again.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        url: Where messages go.
        events: What it is told of; everything by default.
        settings: Which addresses may be called.

    Raises:
        InvalidInput: Code `invalid_webhook_url`, `webhook_address_refused` or `unknown_event`.
        Conflict: Code `too_many_webhooks`.
    """
    webhooks = WebhookRepository(session, principal)
    webhook = Webhook(
        id=new_id("webhook"),
        project_id=principal.project_id,
        url=_checked_url(url, settings),
        secret=_new_secret(),
        events=_known_events(EVENTS if events is None else events),
        enabled=True,
    )
    if webhooks.count() >= MAX_WEBHOOKS:
        raise Conflict(
            f"the project has {MAX_WEBHOOKS} webhooks already",
            code="too_many_webhooks",
            hint="Delete one, or let one tell of more events.",
        )
    webhooks.add(webhook)
    return _with_secret(webhook)


def list_webhooks(session: Session, principal: Principal) -> Page[WebhookRead]:
    """Return all webhooks of the project, newest first."""
    rows = WebhookRepository(session, principal).list()
    return Page(data=[webhook_read(row) for row in rows])


def get(session: Session, principal: Principal, webhook_id: str) -> WebhookRead:
    """Return a webhook.

    Raises:
        NotFound: Code `unknown_webhook`.
    """
    return webhook_read(WebhookRepository(session, principal).get(webhook_id))


def change(
    session: Session,
    principal: Principal,
    webhook_id: str,
    *,
    url: str | None = None,
    events: Sequence[str] | None = None,
    enabled: bool | None = None,
    settings: Settings,
) -> WebhookRead:
    """Change a webhook; `None` leaves a value as it is.

    Disabling ends what waits for it as `dead`, from where it can be replayed later.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        webhook_id: The webhook.
        url: Where messages go, those included that wait.
        events: What it is told of from now on.
        enabled: Whether it is told anything.
        settings: Which addresses may be called.

    Raises:
        NotFound: Code `unknown_webhook`.
        InvalidInput: Code `invalid_webhook_url`, `webhook_address_refused` or `unknown_event`.
    """
    values: dict[str, Any] = {}
    if url is not None:
        values["url"] = _checked_url(url, settings)
    if events is not None:
        values["events"] = _known_events(events)
    if enabled is not None:
        values["enabled"] = enabled
    webhook = WebhookRepository(session, principal).change(webhook_id, **values)
    if enabled is False:
        OutboxRepository(session).give_up(webhook.id, DISABLED)
    return webhook_read(webhook)


def delete(session: Session, principal: Principal, webhook_id: str) -> None:
    """Remove a webhook with its deliveries; what waits is never sent.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        webhook_id: The webhook.

    Raises:
        NotFound: Code `unknown_webhook`.
    """
    webhooks = WebhookRepository(session, principal)
    webhooks.delete(webhooks.get(webhook_id))


def rotate_secret(session: Session, principal: Principal, webhook_id: str) -> WebhookWithSecret:
    """Give a webhook a new secret; for a day messages are signed with the old one, too.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        webhook_id: The webhook.

    Raises:
        NotFound: Code `unknown_webhook`.
    """
    return _with_secret(
        WebhookRepository(session, principal).replace_secret(
            webhook_id, _new_secret(), SECRET_OVERLAP_SECONDS
        )
    )


def send_test(session: Session, principal: Principal, webhook_id: str) -> DeliveryRead:
    """Write a message of type `webhook.test`, which is sent like any other.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        webhook_id: The webhook.

    Raises:
        NotFound: Code `unknown_webhook`.
        Conflict: Code `webhook_disabled`.
    """
    webhook = _enabled(WebhookRepository(session, principal).get(webhook_id))
    return delivery_read(outbox.tell(session, webhook, TEST, {"webhook_id": webhook.id}))


def list_deliveries(
    session: Session,
    principal: Principal,
    webhook_id: str,
    *,
    cursor: str | None = None,
    limit: int = 50,
) -> Page[DeliveryRead]:
    """Return a page of what was or will be sent to a webhook, newest first.

    Raises:
        NotFound: Code `unknown_webhook`.
        InvalidInput: Code `invalid_cursor`.
    """
    webhooks = WebhookRepository(session, principal)
    webhook = webhooks.get(webhook_id)
    before = decode_cursor(cursor) if cursor else None
    rows = webhooks.list_deliveries(webhook.id, before=before, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    return Page(
        data=[delivery_read(row) for row in shown],
        next_cursor=encode_cursor(shown[-1].id) if more else None,
    )


def replay(
    session: Session, principal: Principal, webhook_id: str, delivery_id: str
) -> DeliveryRead:
    """Send a message again, whatever became of it, under its old id and with all attempts anew.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        webhook_id: The webhook.
        delivery_id: The message.

    Raises:
        NotFound: Code `unknown_webhook` or `unknown_delivery`.
        Conflict: Code `webhook_disabled`.
    """
    webhooks = WebhookRepository(session, principal)
    webhook = _enabled(webhooks.get(webhook_id))
    return delivery_read(webhooks.replay(webhook.id, delivery_id))


def _checked_url(url: str, settings: Settings) -> str:
    # The HTTP client's reading of URLs is loaded with the first of them.
    from core.webhooks.addresses import check_url

    return str(check_url(url, allow_private=settings.webhook_allow_private))


def _known_events(events: Sequence[str]) -> list[str]:
    unknown = [event for event in events if event not in EVENTS]
    if unknown or not events:
        raise InvalidInput(
            f"there is no event {unknown[0][:80]!r}" if unknown else "no event is named",
            code="unknown_event",
            field="events",
            hint=f"Events are {', '.join(EVENTS)}.",
        )
    return [event for event in EVENTS if event in events]


def _enabled(webhook: Webhook) -> Webhook:
    if not webhook.enabled:
        raise Conflict(
            "the webhook is disabled",
            code="webhook_disabled",
            hint="Enable it first: PATCH it with enabled: true.",
        )
    return webhook


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode('ascii')}"


def _with_secret(webhook: Webhook) -> WebhookWithSecret:
    return WebhookWithSecret(**webhook_read(webhook).model_dump(), secret=webhook.secret)

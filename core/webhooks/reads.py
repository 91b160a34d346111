"""What owners see of their webhooks and of what was sent to them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.db.models import Webhook, WebhookDelivery

DeliveryStatus = Literal["pending", "delivered", "dead"]


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True)


class WebhookRead(_Read):
    """A webhook without its secret."""

    id: str
    url: str
    events: list[str]
    enabled: bool = Field(description="A disabled webhook is sent nothing.")
    created_at: datetime


class WebhookWithSecret(WebhookRead):
    """A webhook with the secret that signs what it is sent."""

    secret: str = Field(description="`whsec_…`; shown now and never again.")


class DeliveryRead(_Read):
    """One message to one webhook, and how far it has come."""

    id: str = Field(description="The `webhook-id` of the message, the same at every attempt.")
    event: str
    status: DeliveryStatus
    attempts: int = Field(description="Begun since it was written or replayed.")
    next_attempt_at: datetime | None = Field(description="Only while it is pending.")
    response_status: int | None = Field(description="The last HTTP status that came.")
    error: str | None = Field(description="Why the last attempt failed.")
    payload: dict[str, Any]
    created_at: datetime
    delivered_at: datetime | None


def webhook_read(webhook: Webhook) -> WebhookRead:
    """Return what the owner sees of a webhook."""
    return WebhookRead(
        id=webhook.id,
        url=webhook.url,
        events=webhook.events,
        enabled=webhook.enabled,
        created_at=webhook.created_at,
    )


def delivery_read(delivery: WebhookDelivery) -> DeliveryRead:
    """Return what the owner sees of a delivery."""
    next_attempt = None
    if delivery.status == "pending":
        next_attempt = datetime.fromtimestamp(delivery.next_attempt_epoch, UTC)
    return DeliveryRead.model_validate(
        {
            "id": delivery.id,
            "event": delivery.event,
            "status": delivery.status,
            "attempts": delivery.attempts,
            "next_attempt_at": next_attempt,
            "response_status": delivery.response_status,
            "error": delivery.error,
            "payload": delivery.payload,
            "created_at": delivery.created_at,
            "delivered_at": delivery.delivered_at,
        }
    )

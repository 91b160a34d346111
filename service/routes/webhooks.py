"""Webhooks: addresses that are told what happens in the project, and what was sent to them."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from core import webhooks
from core.reads import Page
from core.webhooks import DeliveryRead, WebhookRead, WebhookWithSecret
from service.auth import Trainer
from service.deps import CheckedBody, Cursor, Limit, ReadSession, ServicesDep, WriteSession
from service.openapi import problems
from service.schemas import WebhookBody, WebhookChanges

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Add a webhook",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 409, 413, 422),
)
def create_webhook(
    body: WebhookBody,
    response: Response,
    services: ServicesDep,
    session: WriteSession,
    principal: Trainer,
) -> WebhookWithSecret:
    """Add an address that messages go to; the answer alone shows the secret that signs them.

    Messages are `{"type", "timestamp", "data"}`, signed as Standard Webhooks defines. They come at
    least once: the header `webhook-id` is the same at every attempt.
    """
    webhook = webhooks.create(
        session, principal, url=body.url, events=body.events, settings=services.settings
    )
    response.headers["Location"] = f"/webhooks/{webhook.id}"
    return webhook


@router.get("", summary="List webhooks", responses=problems(401, 403))
def list_webhooks(session: ReadSession, principal: Trainer) -> Page[WebhookRead]:
    """Return all webhooks, newest first."""
    return webhooks.list_webhooks(session, principal)


@router.get("/{webhook_id}", summary="Read a webhook", responses=problems(401, 403, 404))
def get_webhook(webhook_id: str, session: ReadSession, principal: Trainer) -> WebhookRead:
    """Return a webhook, without its secret."""
    return webhooks.get(session, principal, webhook_id)


@router.patch(
    "/{webhook_id}",
    summary="Change a webhook",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 404, 413, 422),
)
def change_webhook(
    webhook_id: str,
    body: WebhookChanges,
    services: ServicesDep,
    session: WriteSession,
    principal: Trainer,
) -> WebhookRead:
    """Change address, events or whether it is enabled; what is left out stays.

    Disabling ends the deliveries that wait as `dead`; they can be replayed later.
    """
    return webhooks.change(
        session,
        principal,
        webhook_id,
        url=body.url,
        events=body.events,
        enabled=body.enabled,
        settings=services.settings,
    )


@router.delete(
    "/{webhook_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a webhook",
    responses=problems(401, 403, 404),
)
def delete_webhook(webhook_id: str, session: WriteSession, principal: Trainer) -> None:
    """Remove a webhook with its deliveries; what waits is never sent."""
    webhooks.delete(session, principal, webhook_id)


@router.post(
    "/{webhook_id}/rotate-secret",
    summary="Replace a webhook's secret",
    responses=problems(401, 403, 404),
)
def rotate_secret(webhook_id: str, session: WriteSession, principal: Trainer) -> WebhookWithSecret:
    """Make a new secret and show it once; for a day the old one signs besides."""
    return webhooks.rotate_secret(session, principal, webhook_id)


@router.post(
    "/{webhook_id}/test",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Send a test message",
    responses=problems(401, 403, 404, 409),
)
def send_test_message(webhook_id: str, session: WriteSession, principal: Trainer) -> DeliveryRead:
    """Send a message of type `webhook.test` like any other; its delivery says what came of it."""
    return webhooks.send_test(session, principal, webhook_id)


@router.get(
    "/{webhook_id}/deliveries",
    summary="List a webhook's deliveries",
    responses=problems(401, 403, 404, 422),
)
def list_deliveries(
    webhook_id: str,
    session: ReadSession,
    principal: Trainer,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[DeliveryRead]:
    """Return what was or will be sent, newest first."""
    return webhooks.list_deliveries(session, principal, webhook_id, cursor=cursor, limit=limit)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/replay",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Send a message again",
    responses=problems(401, 403, 404, 409),
)
def replay_delivery(
    webhook_id: str, delivery_id: str, session: WriteSession, principal: Trainer
) -> DeliveryRead:
    """Send a message again under its old `webhook-id`, whatever became of it."""
    return webhooks.replay(session, principal, webhook_id, delivery_id)

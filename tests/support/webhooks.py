"""Webhooks of a test, what was written for them, and their clock."""

from __future__ import annotations

import threading
import time

from sqlalchemy import update

from core import webhooks
from core.config import Settings
from core.db.models import WebhookDelivery
from core.db.session import Database
from core.principal import LOCAL, Principal
from core.webhooks import DeliveryRead, WebhookWithSecret

RUNNING = threading.Event()
"""Says to a delivery round that the worker is not being stopped."""


def subscribe(
    database: Database,
    settings: Settings,
    url: str,
    *events: str,
    principal: Principal = LOCAL,
) -> WebhookWithSecret:
    with database.session(write=True) as session:
        return webhooks.create(
            session, principal, url=url, events=list(events) or None, settings=settings
        )


def deliveries(database: Database, webhook: WebhookWithSecret) -> list[DeliveryRead]:
    """Return what was written for a webhook, oldest first."""
    with database.session() as session:
        page = webhooks.list_deliveries(session, LOCAL, webhook.id, limit=200)
    return page.data[::-1]


def send_test(database: Database, webhook: WebhookWithSecret) -> DeliveryRead:
    with database.session(write=True) as session:
        return webhooks.send_test(session, LOCAL, webhook.id)


def make_due(database: Database, seconds: float = 0.0) -> None:
    """Set the next attempt of all that waits to the database's past, or some seconds ahead."""
    with database.session(write=True) as session:
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.status == "pending")
            .values(next_attempt_epoch=time.time() - 3600 + seconds)
        )


def next_attempt_in(database: Database, delivery_id: str) -> float:
    with database.session() as session:
        row = session.get_one(WebhookDelivery, delivery_id)
        return row.next_attempt_epoch - time.time()

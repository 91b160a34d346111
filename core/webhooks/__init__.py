"""Webhooks: what happens in a project is told to addresses that its owner names.

A message is written in the transaction of what it tells of (`outbox`), sent later by a worker
(`delivery`, `sending`) to an address that is checked each time (`addresses`), and signed as
Standard Webhooks defines. `endpoints` is what owners do. Of jobs and adapters it knows their rows.
"""

from core.webhooks.delivery import deliver_due
from core.webhooks.endpoints import (
    MAX_WEBHOOKS,
    change,
    create,
    delete,
    get,
    list_deliveries,
    list_webhooks,
    replay,
    rotate_secret,
    send_test,
)
from core.webhooks.events import EVENTS
from core.webhooks.outbox import tell_of_adapter, tell_of_job
from core.webhooks.reads import DeliveryRead, WebhookRead, WebhookWithSecret

__all__ = [
    "EVENTS",
    "MAX_WEBHOOKS",
    "DeliveryRead",
    "WebhookRead",
    "WebhookWithSecret",
    "change",
    "create",
    "delete",
    "deliver_due",
    "get",
    "list_deliveries",
    "list_webhooks",
    "replay",
    "rotate_secret",
    "send_test",
    "tell_of_adapter",
    "tell_of_job",
]

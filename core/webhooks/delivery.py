"""Sends what is due, again and again until it arrives or the attempts are used up.

A delivery is claimed by moving its next attempt into the future, then sent outside any transaction,
then settled. A process that is killed in between has it sent again: at least once, under one id.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.config import Settings
from core.db.models import Webhook, WebhookDelivery, utc_now
from core.db.repositories.webhooks import Due, OutboxRepository
from core.db.session import Database
from core.logging import get_logger

if TYPE_CHECKING:
    from core.webhooks.sending import Answer, Sender

MAX_IN_FLIGHT = 32
MAX_IN_FLIGHT_OF_PROJECT = 8
MAX_IN_FLIGHT_TO_WEBHOOK = 2
FIRST_RETRY_SECONDS = 5.0
RETRY_FACTOR = 4.0
LONGEST_RETRY_SECONDS = 16 * 3600.0
JITTER = 0.2
DISABLED = "the webhook is disabled"

# To write the outcome down.
_HOLD_MARGIN_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_CANDIDATES = 4 * MAX_IN_FLIGHT
_GONE = 410

log = get_logger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A delivery that this process is sending.

    Attributes:
        number: Which attempt it is, from 1.
        held_until_epoch: Until then no other process sends it; names the attempt.
        secrets: What signs it.
    """

    delivery: WebhookDelivery
    webhook: Webhook
    number: int
    held_until_epoch: float
    secrets: tuple[str, ...]


def deliver_due(
    database: Database,
    settings: Settings,
    stopping: threading.Event,
    *,
    sender: Sender | None = None,
) -> int:
    """Send all deliveries that are due; several processes may do this at once.

    Slow receivers hold up none but themselves: what else becomes due while they are waited for is
    sent meanwhile. Costs one query when nothing is due.

    Args:
        database: Where.
        settings: Time-out, number of attempts and which addresses may be called.
        stopping: Once set, nothing more is begun; what is being sent is waited for.
        sender: Another way of sending, for tests.

    Returns:
        How many attempts were made.
    """
    if stopping.is_set() or not _look(database, (), ()):
        return 0
    if sender is None:
        # The HTTP client and the certificates are loaded when there is something to send.
        from core.webhooks.sending import Sender

        sender = Sender(
            timeout_seconds=settings.webhook_timeout_seconds,
            allow_private=settings.webhook_allow_private,
        )
    return _Round(database, settings, sender).run(stopping)


def retry_delay_seconds(attempts: int, asked_seconds: float = 0.0) -> float:
    """Return when to try again after `attempts` failed ones, give or take a fifth.

    Args:
        attempts: How many have failed.
        asked_seconds: What the receiver asked for; it can lengthen the wait up to the longest one.
    """
    delay = min(FIRST_RETRY_SECONDS * RETRY_FACTOR ** min(attempts - 1, 20), LONGEST_RETRY_SECONDS)
    return max(
        delay * random.uniform(1 - JITTER, 1 + JITTER),
        min(asked_seconds, LONGEST_RETRY_SECONDS),
    )


class _Round:
    """One call of `deliver_due`: ends when nothing is due and nothing is being sent."""

    def __init__(self, database: Database, settings: Settings, sender: Sender) -> None:
        self._database = database
        self._settings = settings
        self._sender = sender

    def run(self, stopping: threading.Event) -> int:
        made = 0
        sending: dict[Future[None], Attempt] = {}
        with ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="webhook") as pool:
            while True:
                if not stopping.is_set():
                    for attempt in self._claim(sending.values()):
                        sending[pool.submit(self._send, attempt)] = attempt
                if not sending:
                    return made
                ended, _ = wait(sending, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    del sending[future]
                    future.result()
                    made += 1

    def _claim(self, sending: Collection[Attempt]) -> list[Attempt]:
        """Take what may be sent beside what is being sent."""
        claimed: list[Attempt] = []
        while True:
            chosen = self._choose([*sending, *claimed])
            if not chosen:
                return claimed
            with self._database.session(write=True) as session:
                outbox = OutboxRepository(session)
                taken = outbox.claim(
                    chosen, self._settings.webhook_timeout_seconds + _HOLD_MARGIN_SECONDS
                )
                for delivery, webhook, previous_signs in taken:
                    if webhook.enabled:
                        claimed.append(_attempt(delivery, webhook, previous_signs))
                    else:
                        outbox.settle(
                            delivery.id, delivery.next_attempt_epoch, status="dead", error=DISABLED
                        )
            if not taken:
                # Another process is taking the same ones at this moment.
                return claimed

    def _choose(self, sending: Collection[Attempt]) -> list[str]:
        """Return ids of due deliveries within the limits."""
        to_webhook = Counter(attempt.webhook.id for attempt in sending)
        of_project = Counter(attempt.webhook.project_id for attempt in sending)
        free = MAX_IN_FLIGHT - len(sending)
        if free <= 0:
            return []
        candidates = _look(
            self._database,
            _at(to_webhook, MAX_IN_FLIGHT_TO_WEBHOOK),
            _at(of_project, MAX_IN_FLIGHT_OF_PROJECT),
        )
        chosen: list[str] = []
        for due in candidates:
            if len(chosen) < free and (
                to_webhook[due.webhook_id] < MAX_IN_FLIGHT_TO_WEBHOOK
                and of_project[due.project_id] < MAX_IN_FLIGHT_OF_PROJECT
            ):
                to_webhook[due.webhook_id] += 1
                of_project[due.project_id] += 1
                chosen.append(due.delivery_id)
        return chosen

    def _send(self, attempt: Attempt) -> None:
        from core.webhooks.sending import Answer, Message

        delivery = attempt.delivery
        message = Message(
            id=delivery.id,
            url=attempt.webhook.url,
            secrets=attempt.secrets,
            payload=delivery.payload,
        )
        try:
            answer = self._sender.send(message)
        except Exception:
            # What no receiver should be able to cause; it must not be sent again for ever.
            log.exception("webhook_sending_failed", delivery_id=delivery.id)
            answer = Answer(error="the exchange failed")
        with self._database.session(write=True) as session:
            self._settle(OutboxRepository(session), attempt, answer)
        log.info(
            "webhook_sent" if answer.error is None else "webhook_not_delivered",
            webhook_id=attempt.webhook.id,
            delivery_id=delivery.id,
            attempt=attempt.number,
            status=answer.status,
            error=answer.error,
        )

    def _settle(self, outbox: OutboxRepository, attempt: Attempt, answer: Answer) -> None:
        delivery_id, held_until = attempt.delivery.id, attempt.held_until_epoch
        if answer.error is None:
            outbox.settle(
                delivery_id,
                held_until,
                status="delivered",
                response_status=answer.status,
                error=None,
                delivered_at=utc_now(),
            )
            return
        failure: dict[str, Any] = {"response_status": answer.status, "error": answer.error}
        # First the webhook, then its deliveries: two processes that hear this at once must not wait
        # for each other.
        if answer.status == _GONE and outbox.disable(attempt.webhook.id, attempt.webhook.url):
            failure["error"] = f"HTTP {_GONE}: the receiver wants no more, the webhook is disabled"
            outbox.settle(delivery_id, held_until, status="dead", **failure)
            outbox.give_up(attempt.webhook.id, DISABLED)
        elif attempt.number >= self._settings.webhook_max_attempts:
            outbox.settle(delivery_id, held_until, status="dead", **failure)
        else:
            outbox.settle(
                delivery_id,
                held_until,
                retry_in_seconds=retry_delay_seconds(attempt.number, answer.retry_after_seconds),
                **failure,
            )


def _look(database: Database, not_to: Collection[str], not_of: Collection[str]) -> Iterable[Due]:
    with database.session() as session:
        return OutboxRepository(session).list_due(_CANDIDATES, not_to=not_to, not_of=not_of)


def _at(counts: Counter[str], limit: int) -> list[str]:
    return [name for name, count in counts.items() if count >= limit]


def _attempt(delivery: WebhookDelivery, webhook: Webhook, previous_signs: bool) -> Attempt:
    secrets = [webhook.secret]
    if previous_signs and webhook.previous_secret is not None:
        secrets.append(webhook.previous_secret)
    return Attempt(
        delivery=delivery,
        webhook=webhook,
        number=delivery.attempts,
        held_until_epoch=delivery.next_attempt_epoch,
        secrets=tuple(secrets),
    )

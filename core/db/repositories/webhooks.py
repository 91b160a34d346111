"""Webhooks and what is sent to them: as their owners see them, and as the service sends them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, Webhook, WebhookDelivery
from core.db.repositories.dialect import is_key, lock_content
from core.db.types import database_epoch
from core.errors import NotFound
from core.principal import Principal


class WebhookRepository:
    """Webhooks of one project and the deliveries to them."""

    def __init__(self, session: Session, principal: Principal) -> None:
        self._session = session
        self._principal = principal

    def get(self, webhook_id: str) -> Webhook:
        """Return a webhook.

        Raises:
            NotFound: Code `unknown_webhook`.
        """
        webhook = None
        if is_key(webhook_id):
            webhook = self._session.scalars(
                select(Webhook)
                .where(Webhook.id == webhook_id, self._owned())
                .execution_options(populate_existing=True)
            ).one_or_none()
        if webhook is None:
            raise NotFound(f"no webhook {webhook_id[:80]!r}", code="unknown_webhook")
        return webhook

    def count(self) -> int:
        """Count the project's webhooks; nobody else adds one before this transaction ends."""
        lock_content(self._session, f"webhooks of {self._principal.project_id}")
        query = select(func.count()).select_from(Webhook).where(self._owned())
        return self._session.scalar(query) or 0

    def add(self, webhook: Webhook) -> None:
        """Insert a webhook."""
        self._session.add(webhook)
        self._session.flush()

    def list(self) -> Sequence[Webhook]:
        """Return all webhooks, newest first."""
        return self._session.scalars(
            select(Webhook).where(self._owned()).order_by(Webhook.id.desc())
        ).all()

    def change(self, webhook_id: str, **values: Any) -> Webhook:
        """Change a webhook and return it.

        Raises:
            NotFound: Code `unknown_webhook`.
        """
        if values and is_key(webhook_id):
            self._session.execute(
                update(Webhook)
                .where(Webhook.id == webhook_id, self._owned())
                .values(**values)
                .execution_options(synchronize_session=False)
            )
        return self.get(webhook_id)

    def replace_secret(self, webhook_id: str, secret: str, overlap_seconds: float) -> Webhook:
        """Give a webhook a new secret; the present one signs besides for `overlap_seconds`.

        Raises:
            NotFound: Code `unknown_webhook`.
        """
        return self.change(
            webhook_id,
            secret=secret,
            previous_secret=Webhook.secret,
            previous_secret_until_epoch=database_epoch() + overlap_seconds,
        )

    def delete(self, webhook: Webhook) -> None:
        """Remove a webhook with its deliveries."""
        self._session.execute(
            delete(Webhook)
            .where(Webhook.id == webhook.id, self._owned())
            .execution_options(synchronize_session=False)
        )

    def list_deliveries(
        self, webhook_id: str, *, before: str | None, limit: int
    ) -> Sequence[WebhookDelivery]:
        """Return deliveries older than the id `before`, newest first."""
        query = select(WebhookDelivery).where(
            WebhookDelivery.webhook_id == webhook_id, self._owned(WebhookDelivery)
        )
        if before is not None:
            query = query.where(WebhookDelivery.id < before)
        return self._session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit)).all()

    def replay(self, webhook_id: str, delivery_id: str) -> WebhookDelivery:
        """Make a delivery due, with all its attempts before it.

        Raises:
            NotFound: Code `unknown_delivery`.
        """
        delivery = None
        if is_key(delivery_id):
            delivery = self._session.scalars(
                update(WebhookDelivery)
                .where(
                    WebhookDelivery.id == delivery_id,
                    WebhookDelivery.webhook_id == webhook_id,
                    self._owned(WebhookDelivery),
                )
                .values(
                    status="pending",
                    attempts=0,
                    next_attempt_epoch=database_epoch(),
                    delivered_at=None,
                )
                .returning(WebhookDelivery)
                .execution_options(synchronize_session=False, populate_existing=True)
            ).one_or_none()
        if delivery is None:
            raise NotFound(f"no delivery {delivery_id[:80]!r}", code="unknown_delivery")
        return delivery

    def _owned(self, model: type[Webhook] | type[WebhookDelivery] = Webhook) -> ColumnElement[bool]:
        return model.project_id == self._principal.project_id


class Due(NamedTuple):
    """A delivery that may be sent now."""

    delivery_id: str
    webhook_id: str
    project_id: str


class OutboxRepository:
    """Webhooks and deliveries of all projects, as the service itself writes and sends them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_enabled(self, project_id: str) -> Sequence[Webhook]:
        """Return the webhooks of a project that messages go to.

        They cannot be deleted before this transaction ends: a message for one that is gone would
        undo what the message tells of.
        """
        return self._session.scalars(
            select(Webhook)
            .where(Webhook.project_id == project_id, Webhook.enabled)
            .order_by(Webhook.id)
            .with_for_update(read=True, key_share=True)
        ).all()

    def find_version(self, version_id: str | None) -> AdapterVersion | None:
        """Return an adapter version; without a query when this session has just added it."""
        return self._session.get(AdapterVersion, version_id) if version_id else None

    def add(self, delivery: WebhookDelivery) -> WebhookDelivery:
        """Insert a delivery that is due at once."""
        delivery.next_attempt_epoch = database_epoch()
        self._session.add(delivery)
        self._session.flush()
        return delivery

    def list_due(
        self, limit: int, *, not_to: Collection[str] = (), not_of: Collection[str] = ()
    ) -> Sequence[Due]:
        """Return what may be sent now, the longest overdue first.

        Args:
            limit: How many at most.
            not_to: Webhooks to leave out.
            not_of: Projects to leave out.
        """
        query = select(
            WebhookDelivery.id, WebhookDelivery.webhook_id, WebhookDelivery.project_id
        ).where(self._is_due())
        if not_to:
            query = query.where(WebhookDelivery.webhook_id.not_in(not_to))
        if not_of:
            query = query.where(WebhookDelivery.project_id.not_in(not_of))
        rows = self._session.execute(
            query.order_by(WebhookDelivery.next_attempt_epoch).limit(limit)
        )
        return [Due(*row) for row in rows]

    def claim(
        self, delivery_ids: Collection[str], hold_seconds: float
    ) -> Sequence[tuple[WebhookDelivery, Webhook, bool]]:
        """Begin an attempt at those deliveries that are still due; another may try after a while.

        Args:
            delivery_ids: From `list_due`.
            hold_seconds: From when on another worker may take it that this one has died.

        Returns:
            Each with its webhook and whether the webhook's previous secret still signs.
        """
        # Rows that another worker is taking are skipped, not waited for: two that wait for each
        # other's rows would be a deadlock.
        free = (
            select(WebhookDelivery.id)
            .where(WebhookDelivery.id.in_(delivery_ids), self._is_due())
            .with_for_update(skip_locked=True)
        )
        taken = self._session.scalars(
            update(WebhookDelivery)
            .where(WebhookDelivery.id.in_(free))
            .values(
                attempts=WebhookDelivery.attempts + 1,
                next_attempt_epoch=database_epoch() + hold_seconds,
            )
            .returning(WebhookDelivery)
            .execution_options(synchronize_session=False, populate_existing=True)
        ).all()
        rows = self._session.execute(
            select(
                Webhook,
                func.coalesce(Webhook.previous_secret_until_epoch > database_epoch(), False),
            ).where(Webhook.id.in_({delivery.webhook_id for delivery in taken}))
        )
        webhooks = {row[0].id: (row[0], bool(row[1])) for row in rows}
        return [
            (delivery, *webhooks[delivery.webhook_id])
            for delivery in taken
            if delivery.webhook_id in webhooks
        ]

    def settle(
        self,
        delivery_id: str,
        held_until_epoch: float,
        *,
        retry_in_seconds: float | None = None,
        **values: Any,
    ) -> bool:
        """Write how an attempt ended.

        Args:
            delivery_id: Of what.
            held_until_epoch: `next_attempt_epoch` as the claim has set it: the attempt's token.
            retry_in_seconds: When the next attempt is due, if there is one.
            values: What the attempt changes.

        Returns:
            False when another attempt has begun or the delivery is gone; nothing was changed.
        """
        if retry_in_seconds is not None:
            values["next_attempt_epoch"] = database_epoch() + retry_in_seconds
        changed = self._session.scalars(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.id == delivery_id,
                WebhookDelivery.status == "pending",
                WebhookDelivery.next_attempt_epoch == held_until_epoch,
            )
            .values(**values)
            .returning(WebhookDelivery.id)
            .execution_options(synchronize_session=False)
        )
        return changed.first() is not None

    def disable(self, webhook_id: str, url: str) -> bool:
        """Send a webhook nothing more until its owner enables it; False if its URL is another."""
        disabled = self._session.scalars(
            update(Webhook)
            .where(Webhook.id == webhook_id, Webhook.url == url)
            .values(enabled=False)
            .returning(Webhook.id)
            .execution_options(synchronize_session=False)
        )
        return disabled.first() is not None

    def give_up(self, webhook_id: str, reason: str) -> None:
        """End all deliveries to a webhook that wait."""
        self._session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.status == "pending")
            .values(status="dead", error=reason)
            .execution_options(synchronize_session=False)
        )

    def _is_due(self) -> ColumnElement[bool]:
        # As a subquery the clock is read once, so that the index can be searched for it.
        now = select(database_epoch()).scalar_subquery()
        return (WebhookDelivery.status == "pending") & (WebhookDelivery.next_attempt_epoch <= now)

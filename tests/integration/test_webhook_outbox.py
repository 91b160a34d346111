"""What is told to whom, and that telling belongs to the transaction of what it tells of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, update

from core import jobs, registry, webhooks
from core.config import Settings
from core.db.models import Job, WebhookDelivery
from core.db.models import Webhook as WebhookRow
from core.db.repositories.history import advance
from core.db.repositories.webhooks import OutboxRepository
from core.db.session import Database
from core.errors import Conflict, InvalidInput
from core.principal import LOCAL
from core.storage import LocalStore
from core.webhooks import delivery
from tests.support.factories import (
    add_base_model,
    add_project,
    make_artifact,
    must_claim,
    publish_artifact,
    queue_job,
    submit,
)
from tests.support.receiver import Receiver, receiver
from tests.support.webhooks import (
    RUNNING,
    deliveries,
    send_test,
    subscribe,
)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"webhook_allow_private": True, "webhook_timeout_seconds": 5.0}
    )


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def test_every_end_of_a_job_is_told_once(
    database: Database, store: LocalStore, settings: Settings, hook: Receiver, tmp_path: Path
) -> None:
    add_base_model(database)
    webhook = subscribe(database, settings, hook.url)
    trained = queue_job(database, store, settings, adapter="bot", metadata={"team": "support"})
    claim = must_claim(database, "w")
    manifest = make_artifact(tmp_path / "artifact")
    store.publish_adapter(tmp_path / "artifact")
    jobs.succeed(
        database,
        claim,
        "w",
        manifest=manifest,
        bytes=7,
        report={},
        provenance={},
        store=store,
    )
    failed = queue_job(database, store, settings, adapter="bad")
    error = {"code": "no_rows", "message": "x" * 5000, "hint": "y", "errors": [{"line": 1}]}
    jobs.fail(database, must_claim(database, "w"), "w", error)
    waiting = submit(database, store, settings, adapter="idle")
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, waiting.id)
    paused = queue_job(database, store, settings, adapter="later")
    with database.session(write=True) as session:
        advance(session, Job.id == paused.id, events=[("paused", {})], status="paused")

    assert webhooks.deliver_due(database, settings, RUNNING) == 5
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    told = [received.verify(webhook.secret) for received in hook.received]
    by_type = {(body["type"], body["data"].get("id", "")): body["data"] for body in told}
    assert set(by_type) == {
        ("adapter.published", ""),
        ("job.succeeded", trained.id),
        ("job.failed", failed.id),
        ("job.cancelled", waiting.id),
        ("job.paused", paused.id),
    }
    assert by_type["job.succeeded", trained.id] == {
        "id": trained.id,
        "status": "succeeded",
        "adapter": "bot",
        "base_model": "tiny",
        "attempt": claim.attempt,
        "error": None,
        "version": {"name": "bot", "version": 1, "digest": manifest.digest},
        "metadata": {"team": "support"},
    }
    assert by_type["adapter.published", ""] == {
        "adapter": "bot",
        "version": 1,
        "digest": manifest.digest,
        "base_model": "tiny",
        "origin": "job",
        "job_id": trained.id,
        "promoted": True,
        "quarantine": None,
    }
    told_error = by_type["job.failed", failed.id]["error"]
    assert told_error == {"code": "no_rows", "message": "x" * 1000, "hint": "y"}
    assert by_type["job.paused", paused.id]["status"] == "paused"
    for row in deliveries(database, webhook):
        assert (row.status, row.attempts, row.response_status, row.error) == (
            "delivered",
            1,
            204,
            None,
        )
        assert row.next_attempt_at is None
        assert row.delivered_at is not None
    assert {row.id for row in deliveries(database, webhook)} == {each.id for each in hook.received}


def test_an_import_is_told_as_a_published_adapter(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    add_base_model(database)
    webhook = subscribe(database, settings, "http://127.0.0.1:9/", "adapter.published")
    published = publish_artifact(store, tmp_path / "artifact")
    with database.session(write=True) as session:
        registry.import_adapter(
            session,
            LOCAL,
            name="bot",
            published=published,
            base_model="tiny",
            provenance={},
            store=store,
        )
    (row,) = deliveries(database, webhook)
    assert row.payload["data"]["origin"] == "import"
    assert row.payload["data"]["job_id"] is None


def test_only_subscribers_of_the_project_are_told(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database)
    url = "http://127.0.0.1:9/"
    wanted = subscribe(database, settings, url, "job.cancelled")
    other_event = subscribe(database, settings, url, "job.succeeded", "adapter.published")
    disabled = subscribe(database, settings, url)
    stranger = subscribe(database, settings, url, principal=add_project(database, "stranger"))
    with database.session(write=True) as session:
        webhooks.change(session, LOCAL, disabled.id, enabled=False, settings=settings)
    job = submit(database, store, settings)
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
    with database.session() as session:
        rows = session.scalars(select(WebhookDelivery)).all()
    assert [(row.webhook_id, row.event) for row in rows] == [(wanted.id, "job.cancelled")]
    assert stranger.id != other_event.id


def test_a_change_that_is_rolled_back_is_not_told(
    database: Database, store: LocalStore, settings: Settings, hook: Receiver
) -> None:
    add_base_model(database)
    subscribe(database, settings, hook.url)
    job = submit(database, store, settings)

    def cancel_and_break() -> None:
        with database.session(write=True) as session:
            jobs.cancel(session, LOCAL, job.id)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cancel_and_break()
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    assert hook.received == []


def test_a_project_without_webhooks_costs_one_query(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database)
    job = submit(database, store, settings)
    statements: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        if "webhook" in statement:
            statements.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        with database.session(write=True) as session:
            jobs.cancel(session, LOCAL, job.id)
        assert len(statements) == 1
        statements.clear()
        assert webhooks.deliver_due(database, settings, RUNNING) == 0
        assert len(statements) == 1
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def test_what_was_written_while_its_webhook_was_disabled_is_not_sent(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    send_test(database, webhook)
    with database.session(write=True) as session:
        session.execute(update(WebhookRow).values(enabled=False))
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    (row,) = deliveries(database, webhook)
    assert (row.status, row.error) == ("dead", delivery.DISABLED)
    assert hook.received == []


def test_a_deleted_webhook_takes_its_deliveries_with_it(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    send_test(database, webhook)
    with database.session(write=True) as session:
        webhooks.delete(session, LOCAL, webhook.id)
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    with database.session() as session:
        assert session.scalars(select(WebhookDelivery)).all() == []


@pytest.mark.postgres
def test_a_webhook_that_is_deleted_meanwhile_does_not_undo_the_change_it_is_told_of(
    postgres_database: Database, store: LocalStore, settings: Settings
) -> None:
    database = postgres_database
    add_base_model(database)
    webhook = subscribe(database, settings, "http://127.0.0.1:9/")
    job = submit(database, store, settings)
    deleted = threading.Event()

    def delete() -> None:
        with database.session(write=True) as session:
            webhooks.delete(session, LOCAL, webhook.id)
        deleted.set()

    deleting = threading.Thread(target=delete)
    with database.session(write=True) as session:
        assert OutboxRepository(session).list_enabled(LOCAL.project_id)
        # Between the look at the webhooks and the message for one of them.
        deleting.start()
        assert not deleted.wait(0.3), "it was deleted while a message for it was being written"
        jobs.cancel(session, LOCAL, job.id)
    deleting.join(10)
    assert deleted.is_set()
    with database.session() as session:
        assert jobs.get(session, LOCAL, job.id).status == "cancelled"


def test_a_project_has_a_limited_number_of_webhooks(database: Database, settings: Settings) -> None:
    def create() -> None:
        try:
            subscribe(database, settings, "http://127.0.0.1:9/")
        except Conflict as refused:
            codes.append(refused.code)

    codes: list[str] = []
    for _ in range(webhooks.MAX_WEBHOOKS - 2):
        create()
    assert codes == []
    racing = [threading.Thread(target=create) for _ in range(6)]
    for thread in racing:
        thread.start()
    for thread in racing:
        thread.join(20)
    assert codes == ["too_many_webhooks"] * 4
    with database.session() as session:
        assert len(webhooks.list_webhooks(session, LOCAL).data) == webhooks.MAX_WEBHOOKS
    subscribe(database, settings, "http://127.0.0.1:9/", principal=add_project(database, "other"))


def test_events_must_be_known(database: Database, settings: Settings) -> None:
    for events in (["job.exploded"], ["job.failed", "webhook.test"], []):
        with pytest.raises(InvalidInput) as caught, database.session(write=True) as session:
            webhooks.create(
                session, LOCAL, url="http://127.0.0.1:9/", events=events, settings=settings
            )
        assert (caught.value.code, caught.value.field) == ("unknown_event", "events")
    webhook = subscribe(
        database, settings, "http://127.0.0.1:9/", "job.failed", "job.succeeded", "job.failed"
    )
    assert webhook.events == ["job.succeeded", "job.failed"]


@pytest.mark.postgres
def test_looking_for_what_is_due_reads_the_index(postgres_database: Database) -> None:
    statements: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        statements.append((statement, parameters))

    with postgres_database.session() as session:
        # The table is empty; what counts is which plan is possible, not what an empty one costs.
        for way in ("seqscan", "bitmapscan", "sort"):
            session.connection().exec_driver_sql(f"SET LOCAL enable_{way} = off")
        event.listen(postgres_database.engine, "before_cursor_execute", note)
        try:
            OutboxRepository(session).list_due(10)
        finally:
            event.remove(postgres_database.engine, "before_cursor_execute", note)
        statement, parameters = statements[-1]
        plan = session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters).all()
    text = "\n".join(row[0] for row in plan)
    assert "ix_webhook_deliveries_status_next_attempt_epoch" in text
    assert "next_attempt_epoch <= " in text.split("Index Cond:")[1].split("\n")[0], text
    assert "Sort" not in text, text

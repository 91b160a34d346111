"""From the outbox to the receiver: attempts, retries, replay, several workers."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update

from core import jobs, webhooks
from core.config import Settings
from core.db.models import Webhook as WebhookRow
from core.db.models import WebhookDelivery
from core.db.session import Database
from core.errors import Conflict
from core.principal import LOCAL
from core.storage import LocalStore
from core.webhooks import delivery
from core.webhooks.delivery import retry_delay_seconds
from core.webhooks.sending import Answer, Message, Sender
from tests.support.factories import (
    add_base_model,
    add_project,
    submit,
)
from tests.support.polling import wait_until
from tests.support.receiver import Receiver, receiver, status
from tests.support.webhooks import (
    RUNNING,
    deliveries,
    make_due,
    next_attempt_in,
    send_test,
    subscribe,
)
from worker.duties import Duties, Duty


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"webhook_allow_private": True, "webhook_timeout_seconds": 5.0}
    )


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def test_a_failed_attempt_is_repeated_under_the_same_id_ever_later(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    settings = settings.model_copy(update={"webhook_max_attempts": 4})
    webhook = subscribe(database, settings, hook.url)
    hook.answer = status(500)
    sent = send_test(database, webhook)
    waits: list[float] = []
    for attempt in range(1, 4):
        assert webhooks.deliver_due(database, settings, RUNNING) == 1
        (row,) = deliveries(database, webhook)
        assert (row.status, row.attempts) == ("pending", attempt)
        assert (row.response_status, row.error) == (500, "HTTP 500")
        waits.append(next_attempt_in(database, sent.id))
        assert webhooks.deliver_due(database, settings, RUNNING) == 0, "it was not due"
        make_due(database)
    for wait, planned in zip(waits, (5, 20, 80), strict=True):
        assert 0.75 * planned < wait < 1.25 * planned
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts, row.next_attempt_at) == ("dead", 4, None)
    make_due(database)
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    assert {received.id for received in hook.received} == {sent.id}

    hook.answer = status(200)
    with database.session(write=True) as session:
        replayed = webhooks.replay(session, LOCAL, webhook.id, sent.id)
    assert (replayed.status, replayed.attempts) == ("pending", 0)
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts, row.error, row.response_status) == ("delivered", 1, None, 200)
    assert hook.received[-1].id == sent.id
    assert hook.received[-1].verify(webhook.secret) == sent.payload


def test_the_attempts_spread_over_three_days() -> None:
    waits = [retry_delay_seconds(attempts) for attempts in range(1, 12)]
    assert all(later > earlier for earlier, later in itertools.pairwise(waits[:7]))
    assert 2.3 < sum(waits) / 86_400 < 3.7
    assert max(waits) <= 1.2 * 16 * 3600
    assert len({retry_delay_seconds(3) for _ in range(20)}) > 1, "there is no jitter"
    assert retry_delay_seconds(10**6) <= 1.2 * 16 * 3600


def test_a_receiver_can_ask_for_more_time(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    hook.answer = status(429, Retry_After="600")
    sent = send_test(database, webhook)
    webhooks.deliver_due(database, settings, RUNNING)
    assert 590 < next_attempt_in(database, sent.id) < 610
    hook.answer = status(503, Retry_After="999999999")
    make_due(database)
    webhooks.deliver_due(database, settings, RUNNING)
    assert next_attempt_in(database, sent.id) <= 16 * 3600


def test_a_receiver_that_is_gone_is_sent_nothing_more(
    database: Database, store: LocalStore, settings: Settings, hook: Receiver
) -> None:
    add_base_model(database)
    webhook = subscribe(database, settings, hook.url)
    first = send_test(database, webhook)
    hook.answer = status(410)
    later = send_test(database, webhook)
    with database.session(write=True) as session:
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.id == later.id)
            .values(next_attempt_epoch=time.time() + 3600)
        )
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    rows = {row.id: row for row in deliveries(database, webhook)}
    assert (rows[first.id].status, rows[first.id].response_status) == ("dead", 410)
    assert (rows[later.id].status, rows[later.id].error) == ("dead", delivery.DISABLED)
    with database.session(write=True) as session:
        assert not webhooks.get(session, LOCAL, webhook.id).enabled
        for action in (
            lambda: webhooks.send_test(session, LOCAL, webhook.id),
            lambda: webhooks.replay(session, LOCAL, webhook.id, first.id),
        ):
            with pytest.raises(Conflict) as caught:
                action()
            assert caught.value.code == "webhook_disabled"
    job = submit(database, store, settings)
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
    assert len(deliveries(database, webhook)) == 2

    hook.answer = status(204)
    with database.session(write=True) as session:
        webhooks.change(session, LOCAL, webhook.id, enabled=True, settings=settings)
        webhooks.replay(session, LOCAL, webhook.id, later.id)
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    assert hook.received[-1].id == later.id


def test_a_gone_answer_of_an_earlier_address_does_not_disable_the_new_one(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)

    def move_then_410(handler: Any) -> None:
        with database.session(write=True) as session:
            webhooks.change(session, LOCAL, webhook.id, url=f"{hook.url}/new", settings=settings)
        status(410)(handler)

    hook.answer = move_then_410
    send_test(database, webhook)
    webhooks.deliver_due(database, settings, RUNNING)
    with database.session() as session:
        assert webhooks.get(session, LOCAL, webhook.id).enabled
    hook.answer = status(204)
    make_due(database)
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    assert hook.received[-1].path == "/hook/new"


def test_a_process_killed_before_it_wrote_the_outcome_sends_it_again(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    sent = send_test(database, webhook)
    program = """
import sys, threading
from core import webhooks
from core.config import Settings
from core.db.session import Database
webhooks.deliver_due(Database(sys.argv[1]), Settings(), threading.Event())
"""
    started = threading.Event()
    hook.answer = lambda _: started.wait(10) and process.kill()
    process = subprocess.Popen(
        [sys.executable, "-c", program, database.url], env=os.environ | settings.environment()
    )
    started.set()
    assert process.wait(30) == -signal.SIGKILL
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts) == ("pending", 1)
    # As long as the dead one could still be sending, nobody else does.
    assert webhooks.deliver_due(database, settings, RUNNING) == 0
    assert 0 < next_attempt_in(database, sent.id) < 66
    make_due(database)
    hook.answer = status(204)
    assert webhooks.deliver_due(database, settings, RUNNING) == 1
    assert [received.id for received in hook.received] == [sent.id, sent.id]
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts) == ("delivered", 2)


def test_an_attempt_that_lasted_too_long_does_not_overwrite_the_next_one(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    hook.answer = status(500)
    send_test(database, webhook)

    class SlowSender(Sender):
        def send(self, message: Message) -> Answer:
            make_due(database)
            assert webhooks.deliver_due(database, settings, RUNNING) == 1
            return Answer(status=200)

    slow = SlowSender(timeout_seconds=5, allow_private=True)
    webhooks.deliver_due(database, settings, RUNNING, sender=slow)
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts, row.error) == ("pending", 2, "HTTP 500")


def test_an_error_in_sending_counts_as_an_attempt(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    class BrokenSender(Sender):
        def send(self, message: Message) -> Answer:
            raise KeyError("no receiver should be able to cause this")

    webhook = subscribe(database, settings, hook.url)
    send_test(database, webhook)
    broken = BrokenSender(timeout_seconds=5, allow_private=True)
    assert webhooks.deliver_due(database, settings, RUNNING, sender=broken) == 1
    (row,) = deliveries(database, webhook)
    assert (row.status, row.attempts, row.error) == ("pending", 1, "the exchange failed")


def test_several_workers_send_each_message_once(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    others = [subscribe(database, settings, f"{hook.url}/{n}") for n in range(4)]
    for webhook in others:
        for _ in range(5):
            send_test(database, webhook)
    made: list[int] = []
    workers = [
        threading.Thread(
            target=lambda: made.append(webhooks.deliver_due(database, settings, RUNNING))
        )
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sum(made) == 20
    assert len({received.id for received in hook.received}) == len(hook.received) == 20


def test_a_slow_receiver_holds_up_nobody_else(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    free = threading.Event()

    def wait_then_answer(handler: Any) -> None:
        free.wait(10)
        status(204)(handler)

    with receiver() as slow_hook:
        slow_hook.answer = wait_then_answer
        slow = subscribe(database, settings, slow_hook.url)
        quick = subscribe(database, settings, hook.url)
        for _ in range(10):
            send_test(database, slow)
        round_ = threading.Thread(target=webhooks.deliver_due, args=(database, settings, RUNNING))
        round_.start()
        try:
            slow_hook.wait_for(delivery.MAX_IN_FLIGHT_TO_WEBHOOK)
            for count in (1, 2, 3):
                # Written while the slow ones are being waited for.
                send_test(database, quick)
                hook.wait_for(count)
            assert len(slow_hook.received) == delivery.MAX_IN_FLIGHT_TO_WEBHOOK
        finally:
            free.set()
            round_.join(20)
        assert not round_.is_alive()
        assert len(slow_hook.received) == 10


def test_a_project_full_of_slow_receivers_holds_up_no_other_project(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    free = threading.Event()
    crowd = add_project(database, "crowd")

    def wait_then_answer(handler: Any) -> None:
        free.wait(10)
        status(204)(handler)

    with receiver() as slow_hook:
        slow_hook.answer = wait_then_answer
        for _ in range(webhooks.MAX_WEBHOOKS):
            slow = subscribe(database, settings, slow_hook.url, principal=crowd)
            with database.session(write=True) as session:
                webhooks.send_test(session, crowd, slow.id)
                webhooks.send_test(session, crowd, slow.id)
        round_ = threading.Thread(target=webhooks.deliver_due, args=(database, settings, RUNNING))
        round_.start()
        try:
            slow_hook.wait_for(delivery.MAX_IN_FLIGHT_OF_PROJECT)
            send_test(database, subscribe(database, settings, hook.url))
            hook.wait_for(1)
            assert len(slow_hook.received) == delivery.MAX_IN_FLIGHT_OF_PROJECT
        finally:
            free.set()
            round_.join(20)
        assert len(slow_hook.received) == 2 * webhooks.MAX_WEBHOOKS


def test_nothing_more_is_begun_once_the_worker_stops(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    stopping = threading.Event()

    def stop(handler: Any) -> None:
        stopping.set()
        status(204)(handler)

    hook.answer = stop
    for _ in range(6):
        send_test(database, webhook)
    assert webhooks.deliver_due(database, settings, stopping) <= 2
    assert webhooks.deliver_due(database, settings, stopping) == 0
    states = [row.status for row in deliveries(database, webhook)]
    assert states.count("delivered") == len(hook.received) <= 2
    assert states.count("pending") == 6 - len(hook.received)


def test_a_rotated_secret_signs_beside_the_old_one_for_a_day(
    database: Database, settings: Settings, hook: Receiver
) -> None:
    webhook = subscribe(database, settings, hook.url)
    with database.session(write=True) as session:
        rotated = webhooks.rotate_secret(session, LOCAL, webhook.id)
    assert rotated.secret != webhook.secret
    send_test(database, webhook)
    webhooks.deliver_due(database, settings, RUNNING)
    assert len(hook.received[0].headers["webhook-signature"].split(" ")) == 2
    hook.received[0].verify(webhook.secret)
    hook.received[0].verify(rotated.secret)
    with database.session(write=True) as session:
        session.execute(
            update(WebhookRow).values(
                previous_secret_until_epoch=WebhookRow.previous_secret_until_epoch - 86_400
            )
        )
    send_test(database, webhook)
    webhooks.deliver_due(database, settings, RUNNING)
    assert len(hook.received[1].headers["webhook-signature"].split(" ")) == 1
    hook.received[1].verify(rotated.secret)


def test_the_receiver_is_not_waited_for_inside_a_transaction(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    """On SQLite one writer at a time: a transaction around the exchange would stop this one."""
    webhook = subscribe(sqlite_database, settings, hook.url)
    wrote = threading.Event()

    def write(handler: Any) -> None:
        send_test(sqlite_database, webhook)
        wrote.set()
        hook.answer = status(204)
        status(204)(handler)

    hook.answer = write
    send_test(sqlite_database, webhook)
    webhooks.deliver_due(sqlite_database, settings, RUNNING)
    assert wrote.is_set()
    wait_until(lambda: len(hook.received) == 2, 5, "the second message did not come")


def test_as_a_duty_of_a_worker_it_sends_what_is_written_later(
    sqlite_database: Database, settings: Settings, hook: Receiver
) -> None:
    stopping = threading.Event()
    duties = Duties(
        [
            Duty(
                "webhooks",
                0.05,
                lambda: webhooks.deliver_due(sqlite_database, settings, stopping),
            )
        ]
    )
    webhook = subscribe(sqlite_database, settings, hook.url)
    duties.start()
    try:
        for count in (1, 2):
            send_test(sqlite_database, webhook)
            hook.wait_for(count)
    finally:
        stopping.set()
        duties.stop()
        duties.join(10)
    assert all(row.status == "delivered" for row in deliveries(sqlite_database, webhook))

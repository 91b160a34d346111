"""The job queue: how an idle worker learns at once that the database holds work.

Owns the Celery application, the names of queues and tasks, and the JobQueue protocol. Messages
carry no state: the database is the truth, and workers look there by themselves every few seconds,
so a wake-up may be lost, late or doubled without harm.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Literal, Protocol

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import ChannelError

from core import file_broker
from core.config import Settings
from core.logging import get_logger

QueueName = Literal["train", "light"]

QUEUES: dict[QueueName, str] = {"train": "tunesmith-train", "light": "tunesmith-light"}
WAKE_TASKS: dict[QueueName, str] = {
    "train": "tunesmith.wake_train",
    "light": "tunesmith.wake_light",
}

# By then every worker has looked at the database by itself many times.
_EXPIRES_SECONDS = 60
# A broker forgets what has expired only when a worker reads it. As many wake-ups may wait as there
# are workers to be woken in one moment; with more waiting, nobody reads them.
MAX_WAITING_WAKE_UPS = 100
_PUBLISH_TIMEOUT_SECONDS = 1.0

log = get_logger(__name__)


class JobQueue(Protocol):
    """Wakes workers. Call it after the work is committed."""

    def wake(self, queue: QueueName) -> None:
        """Ask a worker of `queue` to look for work; never raises and never blocks for long."""
        ...


class NullQueue:
    """A queue that wakes nobody and remembers who should have been woken."""

    def __init__(self) -> None:
        self.woken: list[QueueName] = []

    def wake(self, queue: QueueName) -> None:
        """Remember the wake-up."""
        self.woken.append(queue)


class CeleryQueue:
    """Wakes workers through Celery's broker.

    Args:
        settings: Names the broker. After a failure to reach it no further attempt is made for
            `idle_poll_seconds`, by which time the workers have looked by themselves.
    """

    def __init__(self, settings: Settings) -> None:
        self._celery = create_celery(settings)
        self._pause_seconds = settings.idle_poll_seconds
        self._lock = threading.Lock()
        self._paused_until = 0.0

    def wake(self, queue: QueueName) -> None:
        """Publish a wake-up; see `JobQueue`."""
        with self._lock:
            if time.monotonic() < self._paused_until:
                return
        try:
            with self._celery.producer_pool.acquire(block=True) as producer:
                if _waiting(producer.channel, QUEUES[queue]) >= MAX_WAITING_WAKE_UPS:
                    return
                self._celery.send_task(
                    WAKE_TASKS[queue],
                    queue=QUEUES[queue],
                    producer=producer,
                    # The default exchange needs no binding, which a wiped broker would have lost.
                    declare=[],
                    expires=_EXPIRES_SECONDS,
                    retry=False,
                    ignore_result=True,
                )
        except Exception as error:
            with self._lock:
                self._paused_until = time.monotonic() + self._pause_seconds
            log.warning("wake_up_failed", queue=queue, error=repr(error))

    def close(self) -> None:
        """Close the connections to the broker."""
        self._celery.close()


def _waiting(channel: Any, queue: str) -> int:
    """Count the messages of a queue that nobody has read."""
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        # To Redis, an empty queue does not exist.
        return 0


def create_celery(settings: Settings) -> Celery:
    """Return the Celery application for the configured broker.

    Without `broker_url` the broker is the directory `broker/` of the data directory.
    """
    if settings.broker_url:
        url = settings.broker_url
        transport_options = {
            "max_retries": 0,
            "socket_connect_timeout": _PUBLISH_TIMEOUT_SECONDS,
            "socket_timeout": _PUBLISH_TIMEOUT_SECONDS,
        }
    else:
        file_broker.register()
        url = f"{file_broker.SCHEME}://localhost"
        transport_options = file_broker.transport_options(settings.root / "broker")

    app = Celery("tunesmith", broker=url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=_PUBLISH_TIMEOUT_SECONDS,
        broker_heartbeat=0,
        broker_transport_options=transport_options,
        task_acks_late=False,
        task_create_missing_queues=False,
        task_default_queue=QUEUES["train"],
        task_ignore_result=True,
        task_queues=[
            Queue(name, Exchange(name, type="direct"), routing_key=name) for name in QUEUES.values()
        ],
        task_serializer="json",
        worker_concurrency=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_pool="threads",
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return app

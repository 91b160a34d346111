"""The Celery tasks: each wakes the runner of this process, which asks the database what to do."""

from __future__ import annotations

from celery import Celery

from core.queue import WAKE_TASKS, QueueName
from worker.runner import Runner


def register(app: Celery, queue: QueueName, runner: Runner) -> None:
    """Register the task of `queue`."""

    @app.task(name=WAKE_TASKS[queue])  # type: ignore[untyped-decorator]
    def wake() -> None:
        runner.wake()

"""A worker process: Celery in the main thread, the runner beside it, a child below.

Owns how these three start and end together. Imports no model library, so that it starts in a
second and a crash in one costs a child, not a worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from celery import signals
from celery.apps.worker import Worker as CeleryWorker

from core.config import Settings
from core.db.session import Database
from core.lifeline import exit_with_parent
from core.logging import configure, get_logger
from core.queue import QUEUES, CeleryQueue, QueueName, create_celery
from core.storage import LocalStore
from worker import tasks
from worker.child import ChildProcess
from worker.runner import Runner, Stage
from worker.training import TRAINER_ARGV, TrainStage
from worker.validation import VALIDATOR_ARGV, ValidateStage

# The child has the grace period; the worker needs a moment more to write down how it ended.
_JOIN_MARGIN_SECONDS = 4.0

log = get_logger(__name__)


class _Worker(CeleryWorker):  # type: ignore[misc]
    def install_platform_tweaks(self, worker: Any) -> None:
        super().install_platform_tweaks(worker)
        # Celery would start argv anew on SIGHUP, with a runner still at work.
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def run(queue: QueueName, settings: Settings, child_argv: Sequence[str] | None = None) -> int:
    """Run a worker in the main thread until SIGTERM or SIGINT; return the exit code.

    Args:
        queue: `train` or `light`.
        settings: Of the whole service.
        child_argv: Another program for the child.
    """
    configure(settings, process=f"{queue}-worker")
    # A signal that comes before Celery handles them must not skip the release of a job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    exit_with_parent(settings.grace_seconds + _JOIN_MARGIN_SECONDS)

    database = Database(settings.resolved_database_url)
    store = LocalStore(settings.root)
    jobs_queue = CeleryQueue(settings)
    stage: Stage
    if queue == "train":
        stage, argv = TrainStage(settings, store), child_argv or TRAINER_ARGV
    else:
        stage, argv = ValidateStage(store, jobs_queue), child_argv or VALIDATOR_ARGV
    runner = Runner(queue, stage, settings, database, _child(queue, settings, argv))

    app = create_celery(settings)
    tasks.register(app, queue, runner)
    # With a receiver Celery leaves the configuration of logging to us.
    signals.setup_logging.connect(_keep_logging)
    told_to_stop = threading.Event()

    def stop(**_: Any) -> None:
        told_to_stop.set()
        runner.stop()

    signals.worker_shutting_down.connect(stop)
    with warnings.catch_warnings():
        # Root in a container is common, and no pickle is accepted here.
        warnings.filterwarnings("ignore", message=".*superuser privileges.*")
        worker = _Worker(
            app=app,
            queues=[QUEUES[queue]],
            hostname=f"{queue}@{runner.worker_id}",
            quiet=True,
            loglevel="INFO",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
    try:
        runner.start()
        worker.start()
    finally:
        runner.stop()
        ended = runner.join(settings.grace_seconds + _JOIN_MARGIN_SECONDS)
        if not ended:
            log.error("runner_did_not_stop")
        signals.worker_shutting_down.disconnect(stop)
        jobs_queue.close()
        database.close()
    # Celery's own exit code calls a Ctrl-C a failure.
    return 0 if ended and told_to_stop.is_set() else int(worker.exitcode or 1)


def _child(queue: QueueName, settings: Settings, argv: Sequence[str]) -> ChildProcess:
    threads = settings.trainer_threads if queue == "train" else 1
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return ChildProcess(
        argv,
        log_path=settings.root / "logs" / ("trainer.log" if queue == "train" else "validator.log"),
        environment={**settings.environment(), **environment, "TOKENIZERS_PARALLELISM": "false"},
        niceness=settings.trainer_niceness if queue == "train" else 0,
        max_rss_bytes=settings.trainer_max_rss_bytes,
    )


def _keep_logging(**_: Any) -> None:
    """Do nothing, in Celery's place."""

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

from core import housekeeping, webhooks
from core.config import Settings
from core.db.session import Database
from core.lifeline import exit_with_parent
from core.logging import configure, get_logger
from core.queue import QUEUES, CeleryQueue, QueueName, create_celery
from core.storage import ArtifactStore, open_store
from migrations.waiting import wait_for_schema
from worker import tasks
from worker.child import ChildProcess
from worker.duties import Duties, Duty
from worker.exports import Exporter
from worker.runner import Runner, Stage
from worker.training import TRAINER_ARGV, TrainStage
from worker.validation import VALIDATOR_ARGV, ValidateStage

# The child has the grace period; the worker needs a moment more to write down how it ended.
_JOIN_MARGIN_SECONDS = 4.0
# How soon a message is on its way after what it tells of.
_WEBHOOK_SECONDS = 1.0
# How soon an export is begun after it was asked for.
_EXPORT_SECONDS = 2.0

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
    told_to_stop = threading.Event()

    def leave(*_: Any) -> None:
        # Celery may catch the exit, and then asks why.
        told_to_stop.set()
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    exit_with_parent(settings.grace_seconds + _JOIN_MARGIN_SECONDS)
    wait_for_schema(settings.resolved_database_url)

    database = Database(settings.resolved_database_url)
    store = open_store(settings)
    jobs_queue = CeleryQueue(settings)
    stage: Stage
    if queue == "train":
        stage, argv = TrainStage(settings, store), child_argv or TRAINER_ARGV
    else:
        stage, argv = ValidateStage(settings, store, jobs_queue), child_argv or VALIDATOR_ARGV
    runner = Runner(queue, stage, settings, database, _child(queue, settings, argv))

    stopping = threading.Event()
    duties = Duties(
        _light_duties(settings, database, store, runner.worker_id, stopping)
        if queue == "light"
        else []
    )
    app = create_celery(settings)
    tasks.register(app, queue, runner)
    # With a receiver Celery leaves the configuration of logging to us.
    signals.setup_logging.connect(_keep_logging)

    def stop(**_: Any) -> None:
        told_to_stop.set()
        stopping.set()
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
        duties.start()
        worker.start()
    finally:
        stopping.set()
        runner.stop()
        duties.stop()
        ended = runner.join(settings.grace_seconds + _JOIN_MARGIN_SECONDS)
        # What they do is done in small steps, each of which may be cut short.
        duties.join(_JOIN_MARGIN_SECONDS)
        if not ended:
            log.error("runner_did_not_stop")
        signals.worker_shutting_down.disconnect(stop)
        jobs_queue.close()
        database.close()
    # Celery's own exit code calls a Ctrl-C a failure.
    return 0 if ended and told_to_stop.is_set() else int(worker.exitcode or 1)


def _light_duties(
    settings: Settings,
    database: Database,
    store: ArtifactStore,
    worker_id: str,
    stopping: threading.Event,
) -> list[Duty]:
    return [
        Duty(
            "webhooks",
            _WEBHOOK_SECONDS,
            lambda: webhooks.deliver_due(database, settings, stopping),
        ),
        Duty(
            "exports",
            _EXPORT_SECONDS,
            Exporter(settings, database, store, worker_id, stopping).work,
        ),
        Duty(
            "housekeeping",
            settings.gc_interval_seconds,
            lambda: housekeeping.tidy(database, store, settings, worker_id),
        ),
    ]


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

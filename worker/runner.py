"""The runner: the one thread of a worker that claims jobs and sees them through.

Owns the order of things: wake, claim, run in the child, conclude, until nothing is left; and the
duties of an idle worker. Celery only wakes it, the database decides. Knows no Celery.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from core import failpoints, jobs
from core.config import Settings
from core.db.session import Database
from core.errors import LeaseLost, TrainingFailed, TunesmithError, from_wire
from core.ids import new_id
from core.logging import bind, get_logger
from core.queue import QueueName
from core.redaction import Redactor
from core.training.memory_ladder import next_rung
from worker.capabilities import Machine
from worker.checkpoints import CheckpointUploader
from worker.child import ChildProcess, Crashed, Failed, Finished, Outcome, Stopped
from worker.job_output import JobOutput
from worker.lease import Conclude, Lease, is_transient

_REGISTER_SECONDS = 5.0
_AFTER_ERROR_SECONDS = 1.0
_SETTLE_SECONDS = 3.0
_CHILDS_SHARE_OF_GRACE = 0.75
_LOOK_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 30.0

T = TypeVar("T")

log = get_logger(__name__)


class Stage(Protocol):
    """What a worker does with a job of its queue."""

    name: Literal["validate", "train"]

    def task(self, lease: Lease, work_dir: Path, stopping: threading.Event) -> dict[str, Any]:
        """Return what the child gets."""
        ...

    def receive(self, lease: Lease, stopping: threading.Event) -> CheckpointUploader | None:
        """Return who takes the child's checkpoints, if it makes any."""
        ...

    def succeed(self, result: dict[str, Any], conclude: Conclude) -> None:
        """Store the child's result and move the job on."""
        ...


class Runner:
    """Claims jobs of one stage, one at a time.

    Args:
        queue: The worker's queue, as shown to operators.
        stage: What is done with a job.
        settings: Lease, grace and polling times; the data directory.
        database: Where the jobs are.
        child: Does the work.
    """

    def __init__(
        self,
        queue: QueueName,
        stage: Stage,
        settings: Settings,
        database: Database,
        child: ChildProcess,
    ) -> None:
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{new_id('w')[-10:]}"
        self._queue = queue
        self._stage = stage
        self._settings = settings
        self._database = database
        self._child = child
        self._work_root = settings.root / "work"
        self._awake = threading.Event()
        self._awake.set()  # there may be work already
        self._stopping = threading.Event()
        self._redact = Redactor.from_settings(settings, os.environ)
        self._machine = Machine(queue, settings, database)
        # The base model of the child's last task, while that child lives.
        self._warm_base: str | None = None
        self._job_id: str | None = None
        self._register_at = 0.0
        self._tidy_at = 0.0
        self._sweep_from = 0.0
        self._thread = threading.Thread(target=self._work, name="runner", daemon=True)

    def start(self) -> None:
        """Start claiming."""
        self._thread.start()

    def wake(self) -> None:
        """Look for work now; safe from any thread."""
        self._awake.set()

    def stop(self) -> None:
        """Claim nothing more and give the running job back; returns at once.

        Safe in a signal handler: it neither logs nor waits.
        """
        self._stopping.set()
        self._awake.set()

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the end after `stop`; tell whether it came in time."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        log.info("worker_started", worker_id=self.worker_id, queue=self._queue)
        try:
            while not self._stopping.is_set():
                try:
                    self._tidy()
                    self._awake.wait(self._settings.idle_poll_seconds)
                    self._awake.clear()
                    while not self._stopping.is_set() and (claim := self._claim()) is not None:
                        self._run(claim)
                        self._tidy()
                except Exception as error:
                    self._log_trouble(error)
                    self._stopping.wait(_AFTER_ERROR_SECONDS)
        finally:
            self._child.close()
            with contextlib.suppress(SQLAlchemyError):
                jobs.forget_worker(self._database, self.worker_id)
            log.info("worker_stopped", worker_id=self.worker_id)

    def _claim(self) -> jobs.Claim | None:
        return jobs.claim(
            self._database,
            worker_id=self.worker_id,
            stage=self._stage.name,
            lease_seconds=self._settings.lease_seconds,
            worker=self._machine.capabilities(self._warm_base),
            running_quota=self._settings.quota_running_jobs,
        )

    def _run(self, claim: jobs.Claim) -> None:
        self._job_id = claim.job_id
        self._register_at = 0.0
        output = JobOutput(self._redact)
        lease = Lease(
            self._database,
            claim,
            self.worker_id,
            self._settings.lease_seconds,
            on_renewal=self._register,
            time_limit_seconds=self._time_limit_seconds(claim),
            # Nobody can read the log of a dry run.
            output=output if self._settings.job_log_bytes and not claim.dry_run else None,
            max_log_bytes=self._settings.job_log_bytes,
        )
        try:
            with bind(job_id=claim.job_id, attempt=claim.attempt), lease:
                log.info("job_claimed", stage=self._stage.name)
                failpoints.reached("job.claimed", job_id=claim.job_id, attempt=claim.attempt)
                self._see_through(claim, lease, output)
        finally:
            self._job_id = None
            self._register_at = 0.0

    def _see_through(self, claim: jobs.Claim, lease: Lease, output: JobOutput) -> None:
        try:
            try:
                with self._work_dir(claim) as work_dir:
                    self._conclude(lease, self._run_child(claim, lease, output, work_dir))
            except (LeaseLost, SQLAlchemyError):
                raise
            except TunesmithError as error:
                self._concluder(lease)(jobs.fail, error=error.as_dict())
            except Exception as error:
                log.exception("worker_failed")
                broken = TunesmithError(f"the worker failed: {error!r}", code="internal_error")
                self._concluder(lease)(jobs.fail, error=broken.as_dict())
        except LeaseLost:
            log.warning("job_left_to_another_attempt")
        except SQLAlchemyError:
            # The database did not take the end. When the lease expires, the job runs again.
            log.exception("job_not_concluded")

    def _run_child(
        self, claim: jobs.Claim, lease: Lease, output: JobOutput, work_dir: Path
    ) -> Outcome:
        if self._stop_reason(lease) is not None:
            return Stopped(forced=False)
        try:
            task = self._until_available(
                lease, lambda: self._stage.task(lease, work_dir, self._stopping)
            )
        except _Interrupted:
            return Stopped(forced=False)
        checkpoints = self._stage.receive(lease, self._stopping)
        grace = _Grace(self._settings.grace_seconds, lambda: self._stop_reason(lease))
        try:
            return self._child.run(
                task,
                on_event=lambda frame: _report(lease, checkpoints, frame),
                stop_reason=grace.stop_reason,
                grace_seconds=grace.childs_share_seconds,
                on_output=output.feed,
            )
        finally:
            output.finish()
            loaded = self._queue == "train" and self._child.pid is not None
            self._warm_base = lease.claim.base.name if loaded else None
            if checkpoints is not None:
                checkpoints.finish(grace.left_seconds())

    def _stop_reason(self, lease: Lease) -> str | None:
        return lease.stop_reason or ("shutdown" if self._stopping.is_set() else None)

    def _conclude(self, lease: Lease, outcome: Outcome) -> None:
        reason = self._stop_reason(lease)
        conclude = self._concluder(lease)
        if reason == "lost":
            raise LeaseLost("another attempt owns the job")
        match outcome:
            case _ if reason == "cancel":
                conclude(jobs.cancelled)
            case Finished(result):
                try:
                    self._until_available(lease, lambda: self._stage.succeed(result, conclude))
                except _Interrupted:
                    self._conclude(lease, Stopped(forced=False))
            case Failed(error) if error.get("code") == "storage_full":
                self._wait_for_room(lease, error)
                self._conclude(lease, Stopped(forced=False))
            case Failed(error) if not self._retries_smaller(lease.claim, error):
                conclude(jobs.fail, error=from_wire(error).as_dict())
            case Failed(error):
                self._lose(conclude, str(error["message"]), self._next_rung(lease.claim))
            case Stopped() if reason == "time_limit":
                conclude(jobs.fail, error=self._time_is_up(lease.claim).as_dict())
            case Stopped(forced=False):
                # For a shutdown or a pause, or because of a request that was taken back meanwhile.
                conclude(jobs.release)
            case Crashed() | Stopped() if reason in {"shutdown", "pause"}:
                conclude(jobs.release)
            case Crashed(why, out_of_memory=True):
                self._lose(conclude, why, self._next_rung(lease.claim) or lease.claim.memory_rung)
            case Crashed(why):
                self._lose(conclude, why)
            case Stopped():
                self._lose(conclude, "it had to be killed")

    def _until_available(self, lease: Lease, do: Callable[[], T]) -> T:
        """Do something again and again while a part of the service is away that it needs.

        Raises:
            _Interrupted: The work shall stop meanwhile.
        """
        wait_seconds = _AFTER_ERROR_SECONDS
        while True:
            try:
                return do()
            except TunesmithError as error:
                if not error.retryable:
                    raise
                log.warning("waiting_for_service", code=error.code, error=error.message)
                lease.add(
                    jobs.EventUpdate("waiting", {"code": error.code, "reason": error.message})
                )
            if not self._waited(lease, wait_seconds):
                raise _Interrupted
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)

    def _wait_for_room(self, lease: Lease, error: dict[str, Any]) -> None:
        """Keep a job for a while that met a full disk, before it is tried again somewhere."""
        log.warning("worker_disk_full", error=error["message"])
        lease.add(jobs.EventUpdate("waiting", {"code": error["code"], "reason": error["message"]}))
        self._waited(lease, self._settings.idle_poll_seconds)

    def _waited(self, lease: Lease, seconds: float) -> bool:
        """Wait; tell whether it was to the end, and not until the work had to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._stop_reason(lease) is not None:
                return False
            self._stopping.wait(_LOOK_SECONDS)
        return True

    def _retries_smaller(self, claim: jobs.Claim, error: dict[str, Any]) -> bool:
        return error.get("code") == "out_of_memory" and self._next_rung(claim) is not None

    def _next_rung(self, claim: jobs.Claim) -> int | None:
        return next_rung(claim.spec.training, claim.memory_rung)

    def _lose(self, conclude: Conclude, why: str, next_rung: int | None = None) -> None:
        conclude(
            jobs.attempt_lost,
            reason=why,
            max_attempts=self._settings.max_attempts,
            next_rung=next_rung,
        )

    def _time_limit_seconds(self, claim: jobs.Claim) -> int | None:
        limits = (claim.spec.resources.time_limit_seconds, self._settings.max_job_seconds)
        return min((limit for limit in limits if limit), default=None)

    def _time_is_up(self, claim: jobs.Claim) -> TrainingFailed:
        return TrainingFailed(
            f"the job was worked on for longer than {self._time_limit_seconds(claim)} s",
            code="time_limit_exceeded",
            hint="Raise resources.time_limit_seconds and retry; it goes on from its checkpoint.",
        )

    def _concluder(self, lease: Lease) -> Conclude:
        def conclude(write: Callable[..., None], /, **details: Any) -> None:
            lease.conclude(write, self._stopping, **details)
            shown = {name: details[name] for name in ("error", "reason") if name in details}
            log.info("job_concluded", outcome=write.__name__, **shown)

        return conclude

    @contextlib.contextmanager
    def _work_dir(self, claim: jobs.Claim) -> Iterator[Path]:
        path = self._work_root / f"{claim.job_id}-{claim.attempt}"
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _tidy(self) -> None:
        """Do the duties of any worker, at most once per polling interval."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + self._settings.idle_poll_seconds
        self._register()
        if time.monotonic() >= self._sweep_from:
            self._sweep()
        self._remove_stale_work()

    def _sweep(self) -> None:
        swept = jobs.sweep(
            self._database,
            self.worker_id,
            self._settings.lease_seconds,
            self._settings.max_attempts,
        )
        if swept:
            log.warning("leases_expired", jobs=swept)
            self._awake.set()

    def _register(self) -> None:
        if time.monotonic() < self._register_at:
            return
        self._register_at = time.monotonic() + _REGISTER_SECONDS
        jobs.register_worker(
            self._database,
            self.worker_id,
            self._queue,
            socket.gethostname(),
            os.getpid(),
            self._job_id,
            self._machine.capabilities(self._warm_base),
        )

    def _remove_stale_work(self) -> None:
        """Remove what killed workers left behind."""
        # Listed before asking: what is created later is not in the list.
        found = (
            [path.name for path in self._work_root.iterdir()] if self._work_root.is_dir() else []
        )
        if not found:
            return
        live = {f"{job_id}-{attempt}" for job_id, attempt in jobs.held_attempts(self._database)}
        for name in sorted(set(found) - live):
            log.info("stale_work_removed", directory=name)
            shutil.rmtree(self._work_root / name, ignore_errors=True)

    def _log_trouble(self, error: Exception) -> None:
        if isinstance(error, SQLAlchemyError) and is_transient(error):
            # Leases ran out because nobody could renew them; live workers do that first.
            self._sweep_from = time.monotonic() + _SETTLE_SECONDS
            log.warning("database_away", error=str(error).splitlines()[0])
        else:
            log.exception("runner_error")


class _Interrupted(Exception):
    """The work shall stop while it waits for a part of the service."""


class _Grace:
    """The grace period of one task: most of it is the child's, the rest is for its last checkpoint.

    Args:
        seconds: From a stop request to the end of everything.
        ask: Returns why the task shall stop.
    """

    def __init__(self, seconds: float, ask: Callable[[], str | None]) -> None:
        self.childs_share_seconds = seconds * _CHILDS_SHARE_OF_GRACE
        self._seconds = seconds
        self._ask = ask
        self._began: float | None = None

    def stop_reason(self) -> str | None:
        """Return why the task shall stop; the period begins with the first reason."""
        reason = self._ask()
        if reason is not None and self._began is None:
            self._began = time.monotonic()
        return reason

    def left_seconds(self) -> float | None:
        """Return what is left of the period; `None` while it has not begun."""
        self.stop_reason()
        if self._began is None:
            return None
        return max(0.0, self._began + self._seconds - time.monotonic())


def _report(lease: Lease, checkpoints: CheckpointUploader | None, frame: dict[str, Any]) -> None:
    fields = {name: value for name, value in frame.items() if name != "event"}
    match frame["event"]:
        case "progress":
            lease.add(jobs.ProgressUpdate(**fields))
        case "metric":
            lease.add(jobs.MetricUpdate(**fields))
        case "log":
            lease.add(jobs.EventUpdate(**fields))
        case "checkpoint" if checkpoints is not None:
            checkpoints.add(int(fields["step"]), Path(fields["path"]))
        case other:
            log.warning("unknown_child_event", child_event=other)

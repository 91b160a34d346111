"""The lease on a running job: renewed, reported through, and possibly lost.

Owns the thread that speaks to the database while the job's child works: it renews the lease, hears
a cancel request that way, and writes what the child reports in small batches. A database that is
away for a moment loses nothing; a lease that another attempt holds ends everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from core import jobs
from core.db.session import Database
from core.errors import LeaseLost
from core.logging import bind, get_logger
from worker.job_output import JobOutput

_RENEW_SECONDS = 1.0
_FLUSH_SECONDS = 0.4
_RETRY_SECONDS = 1.0
_MAX_BATCH = 500

StopReason = Literal["cancel", "lost", "pause", "time_limit"]

log = get_logger(__name__)


class Conclude(Protocol):
    """Ends a job through `write`, a function of `core.jobs` that takes a claim and `details`."""

    def __call__(self, write: Callable[..., None], /, **details: Any) -> None:
        """Write the end; see `Lease.conclude`."""
        ...


class Lease:
    """Holds a claimed job while its block runs.

    Args:
        database: Where the job is.
        claim: The claimed job.
        worker_id: Who claimed it.
        lease_seconds: How long each renewal lasts.
        on_renewal: Called after every renewal, from the lease's thread.
        output: Lines for the job's log, written with what else is reported.
        max_log_bytes: What is kept of the log.
        time_limit_seconds: Of work on the job, earlier attempts included.
    """

    def __init__(
        self,
        database: Database,
        claim: jobs.Claim,
        worker_id: str,
        lease_seconds: float,
        on_renewal: Callable[[], None] = lambda: None,
        time_limit_seconds: int | None = None,
        output: JobOutput | None = None,
        max_log_bytes: int = 0,
    ) -> None:
        self.claim = claim
        self._output = output
        self._max_log_bytes = max_log_bytes
        self._database = database
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._on_renewal = on_renewal
        self._updates: list[jobs.Update] = []
        self._adding = threading.Lock()
        # Held for each exchange with the database, so that nothing follows the last word.
        self._speaking = threading.Lock()
        self._over = threading.Event()
        self._lost = False
        self._requested = claim.stop_requested
        self._renew_at = time.monotonic()
        self._expires_at = (
            time.monotonic() + time_limit_seconds - claim.used_seconds
            if time_limit_seconds
            else None
        )
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the work must stop, as far as the database and the clock have told."""
        if self._lost:
            return "lost"
        if self._requested == "cancel":
            return "cancel"
        if self._expires_at is not None and time.monotonic() >= self._expires_at:
            return "time_limit"
        return "pause" if self._requested == "pause" else None

    def add(self, update: jobs.Update) -> None:
        """Report something; it is written within half a second."""
        with self._adding:
            last = self._updates[-1] if self._updates else None
            if isinstance(update, jobs.ProgressUpdate) and isinstance(last, jobs.ProgressUpdate):
                self._updates[-1] = _merged(last, update)
            else:
                self._updates.append(update)

    def conclude(
        self, write: Callable[..., None], give_up: threading.Event, **details: Any
    ) -> None:
        """Write what was reported, then the job's end; the lease is over afterwards.

        Retries while the database is away.

        Args:
            write: Ends the job: a function of `core.jobs` that takes a claim.
            give_up: Set when the worker may wait no longer.
            details: Passed to `write`.

        Raises:
            LeaseLost: Another attempt owns the job.
        """
        self._write(write, give_up, details, last=True)

    def write(self, write: Callable[..., None], give_up: threading.Event, **details: Any) -> None:
        """Write what was reported, then something more about the job, such as a checkpoint.

        Takes what `conclude` takes and raises what it raises; the lease goes on.
        """
        self._write(write, give_up, details, last=False)

    def _write(
        self,
        write: Callable[..., None],
        give_up: threading.Event,
        details: dict[str, Any],
        *,
        last: bool,
    ) -> None:
        while True:
            try:
                with self._speaking:
                    self._flush()
                    write(self._database, self.claim, self._worker_id, **details)
                    if last:
                        self._over.set()
                return
            except SQLAlchemyError as error:
                if not is_transient(error) or give_up.is_set():
                    raise
                log.warning("database_away", error=str(error).splitlines()[0])
            give_up.wait(_RETRY_SECONDS)

    def _keep(self) -> None:
        with bind(job_id=self.claim.job_id, attempt=self.claim.attempt):
            while not self._over.wait(_FLUSH_SECONDS):
                try:
                    with self._speaking:
                        if self._over.is_set():
                            return
                        self._flush(renew=time.monotonic() >= self._renew_at)
                except LeaseLost:
                    self._lost = True
                    log.warning("lease_lost")
                    return
                except Exception as error:
                    # The lease lasts for several renewals; meanwhile the database may return.
                    log.warning("lease_not_renewed", error=repr(error))

    def _flush(self, *, renew: bool = False) -> None:
        """Write what was reported; the renewal, when due, goes with it in one transaction."""
        while True:
            with self._adding:
                batch = self._updates[:_MAX_BATCH]
                del self._updates[:_MAX_BATCH]
            lines = self._output.take() if self._output else ""
            if not batch and not lines and not renew:
                return
            try:
                requested = jobs.record(
                    self._database,
                    self.claim,
                    self._worker_id,
                    batch,
                    output=lines,
                    max_log_bytes=self._max_log_bytes,
                    lease_seconds=self._lease_seconds if renew else None,
                )
            except SQLAlchemyError as error:
                if (batch or lines) and not is_transient(error):
                    # It would fail again and hold up everything behind it.
                    log.exception("updates_dropped", count=len(batch), log_characters=len(lines))
                    continue
                with self._adding:
                    self._updates[:0] = batch
                if self._output:
                    self._output.give_back(lines)
                raise
            self._requested = requested
            if renew:
                renew = False
                self._renew_at = time.monotonic() + _RENEW_SECONDS
                self._on_renewal()
            if len(batch) < _MAX_BATCH:
                # What came meanwhile can wait for the next time.
                return


def is_transient(error: SQLAlchemyError) -> bool:
    """Tell whether the same statement may work once the database is back."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)


def _merged(old: jobs.ProgressUpdate, new: jobs.ProgressUpdate) -> jobs.ProgressUpdate:
    known = {name: value for name, value in vars(new).items() if value is not None}
    return jobs.ProgressUpdate(**{**vars(old), **known})

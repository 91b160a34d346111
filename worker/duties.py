"""Recurring duties of a worker process besides its jobs, each in a thread of its own.

Owns when a duty is performed and that its failure stays its own. Knows nothing of what they do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from core.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Duty:
    """Something to be done again and again.

    Attributes:
        name: For the log.
        interval_seconds: From one end to the next start.
        perform: Does it; an exception is logged and the duty comes again.
    """

    name: str
    interval_seconds: float
    perform: Callable[[], object]


class Duties:
    """Runs duties until stopped.

    Args:
        duties: What to do.
    """

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(duty,), name=duty.name, daemon=True)
            for duty in duties
        ]

    def start(self) -> None:
        """Start all duties; each is performed at once."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Start nothing more; returns at once and is safe in a signal handler."""
        self._stopping.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for what is being done, as long as `timeout_seconds` for all together."""
        deadline = time.monotonic() + timeout_seconds
        for thread in self._threads:
            # A signal may have ended the start of one.
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _repeat(self, duty: Duty) -> None:
        while not self._stopping.is_set():
            try:
                duty.perform()
            except SQLAlchemyError as error:
                log.warning("duty_without_database", duty=duty.name, error=type(error).__name__)
            except Exception:
                log.exception("duty_failed", duty=duty.name)
            self._stopping.wait(duty.interval_seconds)

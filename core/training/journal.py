"""The trainer's own lines in its log: what it tells its parent, and how a job ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.child import Stopped
from core.errors import TunesmithError
from core.logging import get_logger
from core.training.monitor import Monitor

log = get_logger(__name__)


class Journal:
    """A monitor that writes to the log what passes through it, but the progress of every step.

    Args:
        monitor: Hears it besides, and knows whether to stop.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    @property
    def stop_reason(self) -> str | None:
        """Why the job shall end; `None` while it shall go on."""
        return self._monitor.stop_reason

    def check_stop(self) -> None:
        """Raise `core.child.Stopped` when the job shall end, for whatever reason."""
        self._monitor.check_stop()

    def send(self, event: str, **fields: Any) -> None:
        """Pass one event on."""
        match event:
            case "log":
                log.info(fields["type"], **fields["data"])
            case "metric":
                log.info("measured", **_shown(fields))
            case "checkpoint":
                log.info("checkpoint_written", step=fields["step"])
        self._monitor.send(event, **fields)


@contextmanager
def outcome(monitor: Monitor) -> Iterator[None]:
    """Log how the block ends, unless its end is told with a traceback."""
    try:
        yield
    except Stopped:
        log.info("training_stopped", reason=monitor.stop_reason)
        raise
    except TunesmithError as error:
        log.error("training_failed", code=error.code, error=error.message)
        raise
    log.info("training_done")


def _shown(measured: dict[str, Any]) -> dict[str, Any]:
    """Return measurements to the digits that a reader wants, without those that are not there."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in measured.items()
        if value is not None
    }

"""What the pipeline tells the outside while it works, and what it asks."""

from __future__ import annotations

from typing import Any, Final, Protocol

# A job that stops for one of these goes on some day, so what it has learnt is saved first.
_SAVING_REASONS: Final = frozenset({"pause", "shutdown", "time_limit"})


class Monitor(Protocol):
    """Hears of progress and knows whether to stop; `core.child.Channel` is one."""

    @property
    def stop_reason(self) -> str | None:
        """Why the job shall end; `None` while it shall go on."""
        ...

    def send(self, event: str, **fields: Any) -> None:
        """Take one event: `progress`, `metric`, `log` or `checkpoint`."""
        ...

    def check_stop(self) -> None:
        """Raise `core.child.Stopped` when the job shall end, for whatever reason."""
        ...


def stops_saved(monitor: Monitor) -> bool:
    """Tell whether the job shall end at the next step boundary, with a checkpoint of it."""
    return monitor.stop_reason in _SAVING_REASONS


def check_stop_at_once(monitor: Monitor) -> None:
    """Raise `core.child.Stopped` when the job shall end and nothing of it is wanted any more."""
    if not stops_saved(monitor):
        monitor.check_stop()


def start_stage(monitor: Monitor, stage: str) -> None:
    """Report that a stage begins, unless the job shall end."""
    monitor.check_stop()
    monitor.send("log", type="stage_started", data={"stage": stage})
    monitor.send("progress", stage=stage)

"""What the pipeline tells the outside while it works, and what it asks."""

from __future__ import annotations

from typing import Any, Protocol


class Monitor(Protocol):
    """Hears of progress and knows whether to stop; `core.child.Channel` is one."""

    def send(self, event: str, **fields: Any) -> None:
        """Take one event: `progress`, `metric` or `log`."""
        ...

    def should_stop(self) -> bool:
        """Tell whether the job shall end at the next step boundary."""
        ...

    def check_stop(self) -> None:
        """Raise `core.child.Stopped` when the job shall end."""
        ...


def start_stage(monitor: Monitor, stage: str) -> None:
    """Report that a stage begins, unless the job shall end."""
    monitor.check_stop()
    monitor.send("log", type="stage_started", data={"stage": stage})
    monitor.send("progress", stage=stage)

"""Questions about other processes."""

from __future__ import annotations

import psutil


def is_gone(process: psutil.Process) -> bool:
    """Tell whether a process has ended, be it that its new parent has yet to take note."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

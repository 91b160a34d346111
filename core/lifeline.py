"""The lifeline: a process of the service does not outlive the process that started it.

Owns the watch on the parent. The parent only has to hold a pipe open, so this works however the
parent ends, SIGKILL included.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

LIFELINE_VARIABLE = "TUNESMITH_LIFELINE"


def exit_with_parent(grace_seconds: float) -> bool:
    """End this process when its parent is gone: SIGTERM to itself, SIGKILL after the grace period.

    A process that `multiprocessing` started (a worker of uvicorn, say) watches the process that
    started it. Any other one watches its stdin if `TUNESMITH_LIFELINE=stdin` says that its parent
    holds the other end; then nothing else may read stdin. Otherwise nothing is watched.

    Args:
        grace_seconds: From the parent's end to SIGKILL.

    Returns:
        Whether a parent is watched.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        _watch(parent.join, grace_seconds)
        return True
    if os.environ.get(LIFELINE_VARIABLE) == "stdin":
        _watch(_wait_for_end_of_stdin, grace_seconds)
        return True
    return False


def _watch(wait_for_parents_end: Callable[[], object], grace_seconds: float) -> None:
    def watch() -> None:
        wait_for_parents_end()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _wait_for_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass

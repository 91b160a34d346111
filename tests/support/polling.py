"""Waiting for a condition instead of sleeping for a guess."""

from __future__ import annotations

import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.02


def wait_until(
    predicate: Callable[[], object], timeout_seconds: float, message: str | Callable[[], str]
) -> None:
    """Return as soon as `predicate` holds; fail with `message` when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(message() if callable(message) else message)
        time.sleep(_INTERVAL_SECONDS)

"""Waiting for a database that is still starting or being migrated by another process."""

from __future__ import annotations

import time

from sqlalchemy.exc import DBAPIError

import migrations
from core.logging import get_logger

_POLL_SECONDS = 1.0
_REMIND_SECONDS = 30.0

log = get_logger(__name__)


def wait_for_schema(url: str) -> None:
    """Return once the database answers and its schema is that of this version, or a later one.

    Says at once what is waited for, and again every half minute. Waits without end: whoever started
    this process can tell from the log, and ends it with a signal.
    """
    said, say_again_at = "", 0.0
    while (missing := _missing(url)) is not None:
        event, facts = missing
        if event != said or time.monotonic() >= say_again_at:
            log.warning(event, **facts)
            said, say_again_at = event, time.monotonic() + _REMIND_SECONDS
        time.sleep(_POLL_SECONDS)
    if said:
        log.info("waiting_is_over")


def _missing(url: str) -> tuple[str, dict[str, str]] | None:
    try:
        revision = migrations.current(url)
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        return "waiting_for_database", {"reason": reason, "hint": "check DATABASE_URL"}
    if migrations.standing(revision) != "behind":
        return None
    return "waiting_for_schema", {
        "revision": revision or "nothing",
        "needed": migrations.head(),
        "hint": "run `tunesmith db upgrade`",
    }

"""The database of this machine's service, for commands that do not go over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from core.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from core.config import Settings
    from core.db.session import Database


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """Open the database; one in the data directory is created or brought up to date first.

    Raises:
        Conflict: Code `schema_outdated`; a database server is at an older revision than ours.
        Unavailable: Code `database_unavailable`.
    """
    import migrations
    from core.db.session import Database

    url = settings.resolved_database_url
    with reachable():
        if not settings.database_url:
            migrations.upgrade(url)
        elif migrations.standing(migrations.current(url)) == "behind":
            raise Conflict(
                "the database's schema is older than this version",
                code="schema_outdated",
                hint="Run `tunesmith db upgrade`.",
            )
    database = Database(url)
    try:
        with reachable():
            yield database
    finally:
        database.close()


@contextmanager
def reachable() -> Iterator[None]:
    """Turn the database library's errors of a block into ours.

    Raises:
        Unavailable: Code `database_unavailable`.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise Unavailable(
            f"the database cannot be used: {reason}",
            code="database_unavailable",
            hint="`tunesmith doctor` looks for the cause.",
        ) from error

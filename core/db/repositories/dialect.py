"""The few statements that SQLAlchemy spells differently for SQLite and for Postgres."""

from __future__ import annotations

import re

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

# Postgres ends a transaction that idles for so long: its process is gone or cut off.
_LONGEST_TURN = "10s"
_KEY = re.compile(r"[\x21-\x7e]{1,128}")


def is_key(value: str) -> bool:
    """Tell whether a caller's text can be the key of a row at all.

    Postgres refuses some texts (zero bytes, lone surrogates) with an error where the answer is
    just that there is no such row.
    """
    return _KEY.fullmatch(value) is not None


def insert_into(
    session: Session, model: type[DeclarativeBase]
) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that knows `ON CONFLICT` in the session's dialect."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(model)
    return sqlite.insert(model)


def lock_content(session: Session, digest: str) -> None:
    """Keep others from adding or dropping references to a digest until this transaction ends.

    SQLite needs nothing: the transaction, opened for writing, is the only one.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(digest, 0))))


def take_turn(session: Session, name: str) -> None:
    """Wait until no other transaction has the turn `name`, and have it until this one ends.

    SQLite needs nothing: the transaction, opened for writing, is the only one. A process that is
    cut off in the middle of its turn loses it after `_LONGEST_TURN`.
    """
    if can_lock_rows(session):
        session.execute(
            select(
                func.set_config("idle_in_transaction_session_timeout", _LONGEST_TURN, True),
                func.pg_advisory_xact_lock(func.hashtextextended(name, 0)),
            )
        )


def can_lock_rows(session: Session) -> bool:
    """Tell whether the database locks rows one by one; SQLite locks all there is."""
    return session.get_bind().dialect.name == "postgresql"

"""The few statements that SQLAlchemy spells differently for SQLite and for Postgres."""

from __future__ import annotations

import re

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

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

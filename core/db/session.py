"""Engines and sessions; SQLite is made honest here (WAL, foreign keys, real BEGIN IMMEDIATE)."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

_BUSY_TIMEOUT_MILLISECONDS = 15_000
_WAL_RETRY_SECONDS = 0.02
# Postgres ends the transaction of a process that hangs or is cut off; its locks would last.
_IDLE_TRANSACTION_SECONDS = 15


def create_database(url: str) -> Engine:
    """Return a SQLAlchemy engine for `url`, with SQLite's transactions under our control.

    On SQLite every transaction starts as `BEGIN IMMEDIATE` when it was opened with `write=True` in
    `Database.session`, so that a claim never fails half-way with a stale snapshot.
    """
    if not url.startswith("sqlite"):
        return _create_postgres(url)
    engine = create_engine(
        url, connect_args={"timeout": _BUSY_TIMEOUT_MILLISECONDS / 1000, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # we emit BEGIN ourselves, below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MILLISECONDS}")
        _switch_to_wal(cursor)
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _create_postgres(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=10)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        # Not as an option of the connection, which poolers in between do not pass on.
        with connection.cursor() as cursor:
            limit = f"{_IDLE_TRANSACTION_SECONDS * 1000:.0f}"
            cursor.execute(f"SET idle_in_transaction_session_timeout = {limit}")
            # The default is for turning disks: a project's jobs would be looked for along the
            # primary key, through those of all others.
            cursor.execute("SET random_page_cost = 1.1")
        connection.commit()

    return engine


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    """Make the file's journal a write-ahead log, which every connection after this one finds so.

    SQLite waits for nobody here: when two connections switch at the same moment, waiting could be a
    deadlock, so one of them is told at once that the database is locked, and tries again.
    """
    deadline = time.monotonic() + _BUSY_TIMEOUT_MILLISECONDS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_WAL_RETRY_SECONDS)


class Database:
    """One database: short sessions that commit on success and roll back on any error.

    Args:
        url: SQLAlchemy URL, see `Settings.resolved_database_url`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = create_database(url)
        self._reading = sessionmaker(self.engine, expire_on_commit=False)
        self._writing = sessionmaker(
            self.engine.execution_options(write=True), expire_on_commit=False
        )

    @contextmanager
    def session(self, *, write: bool = False) -> Iterator[Session]:
        """Open a session for one short unit of work.

        Args:
            write: Take the write lock at once (SQLite); no effect on Postgres.
        """
        maker = self._writing if write else self._reading
        with maker.begin() as session:
            yield session

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()

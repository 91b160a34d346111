"""How Alembic runs our migrations: in one transaction, one process at a time."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, text

from core.db.models import Base
from core.db.session import create_database
from core.db.types import UtcDateTime

# Any number that no other program takes on the same database; "tune" in ASCII.
_ADVISORY_LOCK = 0x74756E65


def _run() -> None:
    engine = create_database(context.config.attributes["url"]).execution_options(write=True)
    try:
        with engine.connect() as connection:
            sqlite = connection.dialect.name == "sqlite"
            if sqlite:
                # A table that a migration rebuilds is dropped on the way; its references shall
                # survive that. Cannot be changed inside a transaction.
                _pragma(connection, "foreign_keys = OFF")
            with connection.begin():
                if not sqlite:
                    connection.execute(
                        text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK}
                    )
                context.configure(
                    connection=connection,
                    target_metadata=Base.metadata,
                    render_as_batch=sqlite,
                    render_item=_render_item,
                )
                context.run_migrations()
                if sqlite:
                    _check_references(connection)
    finally:
        engine.dispose()


def _render_item(kind: str, item: Any, _: AutogenContext) -> str | Literal[False]:
    """Write plain types into new migrations, which must not change with the code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def _pragma(connection: Connection, statement: str) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(f"PRAGMA {statement}")
    cursor.close()


def _check_references(connection: Connection) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise RuntimeError(f"the migration would break references: {broken[:5]}")


_run()

"""Whole tables, read as of one instant and written into an empty schema of any revision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Connection,
    Float,
    Table,
    Text,
    column,
    delete,
    exists,
    insert,
    inspect,
    select,
    table,
)
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from core.db.models import Adapter, AdapterVersion, Base, Dataset, Job, JobCheckpoint, JobSource
from core.db.session import Database
from core.db.types import UtcDateTime
from core.job_status import UNFINISHED
from core.principal import DEFAULT_PROJECT_ID

ColumnKind = Literal["text", "integer", "real", "boolean", "json", "time"]

# What belongs to processes that run and means nothing elsewhere, and what can be made again.
_TRANSIENT: Final = frozenset({"exports", "leases", "workers"})
_ROWS_AT_A_TIME = 500
_TYPES: Final[Mapping[ColumnKind, TypeEngine[Any]]] = {
    "text": Text(),
    "integer": BigInteger(),
    "real": Float(),
    "boolean": Boolean(),
    "json": JSON(none_as_null=True),
    "time": UtcDateTime(),
}


@contextmanager
def snapshot(database: Database) -> Iterator[Connection]:
    """Open a connection that sees the database as of one instant and keeps no writer waiting."""
    with database.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        with connection.begin():
            yield connection


def kept_tables() -> Sequence[Table]:
    """Return the tables that a backup holds, each behind those that it refers to."""
    return [one for one in Base.metadata.sorted_tables if one.name not in _TRANSIENT]


def column_kinds(of: Table) -> dict[str, ColumnKind]:
    """Return what kind of values each column of a table has."""
    return {one.name: _kind(one.type) for one in of.columns}


def read_rows(connection: Connection, of: Table) -> Iterator[dict[str, Any]]:
    """Yield all rows of a table, a few at a time, in the order of their keys."""
    names = list(of.columns.keys())
    rows = connection.execute(
        select(of).order_by(*of.primary_key.columns),
        execution_options={"yield_per": _ROWS_AT_A_TIME},
    )
    for row in rows:
        yield dict(zip(names, row, strict=True))


def list_occupied(database: Database) -> list[str]:
    """Return those tables that hold more than a fresh schema does."""
    present = set(inspect(database.engine).get_table_names())
    occupied = []
    with database.session() as session:
        for one in kept_tables():
            if one.name in present:
                key = next(iter(one.primary_key.columns))
                query = select(key)
                if one.name == "projects":
                    query = query.where(key != DEFAULT_PROJECT_ID)
                if session.execute(query.limit(1)).first() is not None:
                    occupied.append(one.name)
    return occupied


def clear_projects(connection: Connection) -> None:
    """Remove the project that a fresh schema comes with; the backup has it too."""
    connection.execute(delete(table("projects")))


def load_rows(
    connection: Connection,
    name: str,
    kinds: Mapping[str, ColumnKind],
    rows: Iterable[dict[str, Any]],
) -> int:
    """Insert rows into a table with these columns; return how many.

    The models are of no use here: the schema may be an older one than theirs.
    """
    target = table(name, *(column(one, _TYPES[kind]) for one, kind in kinds.items()))
    count = 0
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_A_TIME:
            connection.execute(insert(target), batch)
            count += len(batch)
            batch = []
    if batch:
        connection.execute(insert(target), batch)
    return count + len(batch)


def forget_blob(session: Session, sha256: str) -> None:
    """Delete the checkpoints and data sets with these bytes, but those that a job needs."""
    alone = exists().where(Job.dataset_id == Dataset.id, Job.status.in_(UNFINISHED))
    beside = exists().where(
        JobSource.dataset_id == Dataset.id,
        Job.id == JobSource.job_id,
        Job.status.in_(UNFINISHED),
    )
    for statement in (
        delete(JobCheckpoint).where(JobCheckpoint.sha256 == sha256),
        delete(Dataset).where(Dataset.sha256 == sha256, ~alone, ~beside),
    ):
        session.execute(statement.execution_options(synchronize_session=False))


def list_versions_of(session: Session, digest: str) -> Sequence[tuple[str, str, int]]:
    """Return project, adapter name and number of all versions with a digest."""
    rows = session.execute(
        select(AdapterVersion.project_id, Adapter.name, AdapterVersion.version)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .where(AdapterVersion.digest == digest)
    )
    return [(row[0], row[1], row[2]) for row in rows]


def _kind(of: TypeEngine[Any]) -> ColumnKind:
    if isinstance(of, UtcDateTime):
        return "time"
    if isinstance(of, JSON):
        return "json"
    kinds: Mapping[type, ColumnKind] = {bool: "boolean", int: "integer", float: "real", str: "text"}
    return kinds[of.python_type]

"""How a database carries out the statements that real functions send it.

Each statement is explained in the very place where it runs: on its connection, in its transaction,
with its parameters and what the transaction did before. Postgres really carries it out once more
and takes it back, so what counts is what was read, not what the planner thought.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event

from core.db.session import Database

GROWING = frozenset(
    {
        "adapter_versions",
        "adapters",
        "datasets",
        "idempotency_keys",
        "job_checkpoints",
        "job_events",
        "job_logs",
        "job_metrics",
        "jobs",
        "webhook_deliveries",
    }
)
"""Tables that have more rows the longer the service is used."""

_EXPLAINED = re.compile(r"\s*(SELECT|UPDATE|DELETE|INSERT|WITH)\b", re.IGNORECASE)
_SCAN = re.compile(r"SCAN (\w+)")


@dataclass(frozen=True)
class Plan:
    """How one statement is carried out.

    Attributes:
        statement: The statement, as sent.
        text: The database's own words.
        scanned: Growing tables that are read from end to end.
        sorted_rows: Rows that were sorted; on SQLite 1 for any sort, since it does not count them.
        touched_rows: Most rows that one step looked at, the rejected ones included; 0 on SQLite.
    """

    statement: str
    text: str
    scanned: frozenset[str]
    sorted_rows: int
    touched_rows: int


@dataclass
class Plans:
    """The plans of all statements of a block."""

    all: list[Plan] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n\n".join(f"{plan.statement}\n{plan.text}" for plan in self.all)


@contextmanager
def explained(database: Database) -> Iterator[Plans]:
    """Yield the plans of what the block sends, filled as it goes."""
    plans = Plans()
    postgres = database.engine.dialect.name == "postgresql"

    def explain(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if many or not _EXPLAINED.match(statement):
            return
        raw = connection.connection.cursor()
        try:
            explain_one = _explain_postgres if postgres else _explain_sqlite
            plans.all.append(explain_one(raw, statement, parameters))
        finally:
            raw.close()

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        yield plans
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)


def _explain_postgres(cursor: Any, statement: str, parameters: Any) -> Plan:
    cursor.execute("SAVEPOINT explained")
    cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters or None)
    (explained,) = cursor.fetchone()[0]
    cursor.execute("ROLLBACK TO SAVEPOINT explained")
    nodes = list(_nodes(explained["Plan"], 0))
    return Plan(
        statement=statement,
        text="\n".join("  " * depth + _describe(node) for depth, node in nodes),
        scanned=frozenset(
            node["Relation Name"] for _, node in nodes if node["Node Type"] == "Seq Scan"
        )
        & GROWING,
        sorted_rows=max(
            (
                _rows(child)
                for _, node in nodes
                if "Sort" in node["Node Type"]
                for child in node["Plans"]
            ),
            default=0,
        ),
        touched_rows=max(_rows(node) for _, node in nodes),
    )


def _nodes(node: dict[str, Any], depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
    yield depth, node
    for child in node.get("Plans", ()):
        yield from _nodes(child, depth + 1)


def _rows(node: dict[str, Any]) -> int:
    rejected = sum(value for name, value in node.items() if name.startswith("Rows Removed by"))
    return int((node["Actual Rows"] + rejected) * node["Actual Loops"])


def _describe(node: dict[str, Any]) -> str:
    shown = ("Node Type", "Relation Name", "Index Name", "Index Cond", "Filter", "Sort Key")
    words = [str(node[name]) for name in shown if name in node]
    return f"{' | '.join(words)} ({_rows(node)} rows)"


def _explain_sqlite(cursor: Any, statement: str, parameters: Any) -> Plan:
    cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
    steps = [row[3] for row in cursor.fetchall()]
    text = "\n".join(steps)
    return Plan(
        statement=statement,
        text=text,
        scanned=frozenset(_SCAN.findall(text)) & GROWING,
        sorted_rows=sum("TEMP B-TREE" in step for step in steps),
        touched_rows=0,
    )

"""A database that has grown: many jobs of several projects, made by the database itself.

The same number gives the same job, so a small and a large database differ in size alone. The newest
hundredth waits, a few jobs before them run or are paused, all others have ended: 88 % succeeded,
each with an adapter of its own. Every tenth has 100 measurements and as many lines of log. Ids sort
as numbers do, and before any new one.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sqlalchemy import text
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from core.auth import LOCAL
from core.db.models import Job, Project, Webhook
from core.db.session import Database
from core.principal import Principal
from tests.support.factories import add_base_model, make_spec

PROJECTS = 8
POINTS_PER_MEASURED_JOB = 100
MEASURED_EVERY = 10
EVENTS_PER_JOB = 3
CHECKPOINTS_PER_JOB = 2
RARE_MODEL = "rare"

# What the two databases spell differently.
_DIALECT = {
    "postgresql": {
        "numbers": "WITH numbers AS (SELECT n FROM generate_series(0, :last) AS series (n))",
        "number": "substr(id, 8) :: bigint",
        "padded": "lpad(({}) :: text, 23, '0')",
        "time": "timestamptz '2026-01-01 00:00:00+00' + ({}) * interval '1 second'",
    },
    "sqlite": {
        "numbers": "WITH RECURSIVE numbers (n) AS "
        "(SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < :last)",
        "number": "CAST(substr(id, 8) AS INTEGER)",
        "padded": "printf('%023d', {})",
        "time": "datetime('2026-01-01', ({}) || ' seconds')",
    },
}

_DATASETS = """
INSERT INTO datasets (id, project_id, filename, format, rows, bytes, sha256, report, created_at)
{numbers}
SELECT 'file-' || n, 'project-' || (n % :projects), 'rows.jsonl', 'messages', 100, 10000,
  {padded:n}, '{{}}', {time:n}
FROM numbers
"""

# Columns that are not named have their defaults, as in a new job.
_JOBS = """
INSERT INTO jobs (
  id, project_id, dataset_id, base_model, adapter_name, spec, queue_rank, status, attempt,
  worker_id, lease_expires_epoch, validated, used_seconds, stage, step, total_steps,
  trained_tokens, last_event, created_at, started_at, finished_at,
  version_id, {others}
)
{numbers}, states AS (
  SELECT n, CASE
    WHEN n >= :last + 1 - :waiting THEN CASE WHEN n % 10 = 0 THEN 'validating' ELSE 'queued' END
    WHEN n >= :last + 1 - 2 * :waiting AND n % 50 = 0 THEN 'running'
    WHEN n >= :last + 1 - 2 * :waiting AND n % 50 = 1 THEN 'paused'
    WHEN n % 100 < 6 THEN 'failed'
    WHEN n % 100 < 12 THEN 'cancelled'
    ELSE 'succeeded'
  END AS status FROM numbers
)
SELECT
  'job-01a' || {padded:n}, 'project-' || (n % :projects), 'file-' || (n % :datasets), 'tiny',
  'bot-' || (n % :adapters), :spec, CASE WHEN n % 7 = 0 THEN -5 ELSE 0 END, status,
  CASE WHEN status = 'validating' THEN 0 ELSE 2 END,
  CASE WHEN status = 'running' THEN 'worker-' || n END,
  CASE WHEN status = 'running' THEN 4102444800.0 END, status <> 'validating', 60.0,
  CASE WHEN status = 'running' THEN 'train' END, 100, 100, 50000, :events, {time:n}, {time:n},
  CASE WHEN status IN ('succeeded', 'failed', 'cancelled') THEN {time:n + 60} END,
  CASE WHEN status = 'succeeded' THEN 'version-' || n END, {defaults}
FROM states
"""

_EVENTS = """
INSERT INTO job_events (job_id, sequence, attempt, type, data, created_at)
{numbers}
SELECT 'job-01a' || {padded:n / :each}, n % :each + 1, 1, 'created', '{{"adapter": "bot"}}',
  {time:n}
FROM numbers
"""

_METRICS = """
INSERT INTO job_metrics (
  job_id, attempt, step, epoch, loss, learning_rate, grad_norm, tokens_per_second, created_at
)
{numbers}
SELECT 'job-01a' || {padded:n / :each * :every}, 2, n % :each, 0.5, 1.25, 0.0002, 0.9, 150.0,
  {time:n}
FROM numbers
"""

_LOGS = """
INSERT INTO job_logs (job_id, end_byte, attempt, text, created_at)
{numbers}
SELECT 'job-01a' || {padded:n / :each * :every}, (n % :each + 1) * 7, 2, 'a line
', {time:n}
FROM numbers
"""

_ADAPTERS = """
INSERT INTO adapters (id, project_id, name, last_version, created_at)
{numbers}
SELECT 'adapter-' || n, 'project-' || (n % :projects), 'bot-' || n, 1, {time:n}
FROM numbers
"""

_VERSIONS = """
INSERT INTO adapter_versions (
  id, project_id, adapter_id, version, digest, bytes, base_model, base_digest, origin, job_id,
  manifest, provenance, created_at
)
SELECT version_id, project_id, 'adapter-' || substr(adapter_name, 5), {number} / :adapters + 1,
  substr(id, 5), 1000000, base_model, 'b', 'job', id, '{{}}', '{{}}', created_at
FROM jobs WHERE status = 'succeeded'
"""

_CHECKPOINTS = """
INSERT INTO job_checkpoints (job_id, step, attempt, sha256, bytes, created_at)
{numbers}
SELECT id, n * 50, attempt, substr(id, 5), 1000000, created_at
FROM jobs CROSS JOIN numbers WHERE status IN ('running', 'paused', 'failed') AND n > 0
"""

_KEYS = """
INSERT INTO idempotency_keys (project_id, key, body_sha256, job_id, created_at)
SELECT project_id, id, 'b', id, created_at FROM jobs WHERE {number} % 4 = 0
"""

_DELIVERIES = """
INSERT INTO webhook_deliveries (
  id, project_id, webhook_id, event, payload, status, attempts, next_attempt_epoch, created_at,
  delivered_at
)
SELECT 'delivery-' || substr(id, 5), project_id, 'webhook-' || substr(project_id, 9), 'job.ended',
  '{{}}', CASE {number} % 1000 WHEN 1 THEN 'pending' WHEN 2 THEN 'dead' ELSE 'delivered' END,
  1, {number}, created_at, created_at
FROM jobs WHERE finished_at IS NOT NULL
"""


def job_id(number: int) -> str:
    """Return the id of the job with this number, counted from 0."""
    return f"job-01a{number:023d}"


def owner(number: int) -> Principal:
    """Return who owns the job with this number."""
    return Principal(f"project-{number % PROJECTS}", LOCAL.scopes)


def fill(database: Database, jobs: int) -> None:
    """Put jobs with their events and measurements into a migrated database without rows.

    Args:
        database: SQLite, or Postgres as a superuser: the checks of foreign keys are off meanwhile.
        jobs: How many; a multiple of 1000.
    """
    add_base_model(database)
    add_base_model(database, RARE_MODEL, digest="c" * 64)
    with database.session(write=True) as session:
        session.add_all(Project(id=f"project-{n}", name=f"project-{n}") for n in range(PROJECTS))
        session.add_all(
            Webhook(
                id=f"webhook-{n}",
                project_id=f"project-{n}",
                url="https://example.com",
                secret="s",
                events=[],
            )
            for n in range(PROJECTS)
        )
    sizes = {
        "projects": PROJECTS,
        "adapters": jobs,
        "datasets": jobs // 80 * PROJECTS,
    }
    spec = make_spec(adapter="bot").model_dump(mode="json") | {"rows": None, "dataset": "file-0"}
    of_jobs = {"spec": json.dumps(spec), "waiting": jobs // 100, "events": EVENTS_PER_JOB}
    points = jobs // MEASURED_EVERY * POINTS_PER_MEASURED_JOB
    of_metrics = {"each": POINTS_PER_MEASURED_JOB, "every": MEASURED_EVERY}
    _insert(database, _DATASETS, sizes["datasets"], sizes)
    _insert(database, _ADAPTERS, sizes["adapters"], sizes)
    _insert(database, _JOBS, jobs, sizes | of_jobs | _other_defaults())
    _insert(database, _VERSIONS, 0, sizes)
    _insert(database, _EVENTS, jobs * EVENTS_PER_JOB, {"each": EVENTS_PER_JOB})
    _insert(database, _METRICS, points, of_metrics)
    _insert(database, _LOGS, points, of_metrics)
    _insert(database, _CHECKPOINTS, CHECKPOINTS_PER_JOB + 1, {})
    _insert(database, _KEYS, 0, {})
    _insert(database, _DELIVERIES, 0, {})
    refresh_statistics(database)


def refresh_statistics(database: Database) -> None:
    """Do at once what a database server does by itself in time."""
    if database.engine.dialect.name == "postgresql":
        with database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("VACUUM ANALYZE"))


def _insert(database: Database, template: str, rows: int, parameters: dict[str, Any]) -> None:
    dialect = _DIALECT[database.engine.dialect.name]
    defaults = _other_defaults()
    statement = text(
        template.format(
            numbers=dialect["numbers"],
            number=dialect["number"],
            padded=_Fragment(dialect["padded"]),
            time=_Fragment(dialect["time"]),
            others=", ".join(defaults),
            defaults=", ".join(f":{name}" for name in defaults),
        )
    )
    known = {"last": rows - 1, **parameters}
    with database.session(write=True) as session:
        if database.engine.dialect.name == "postgresql":
            session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(statement, {name: known[name] for name in statement.compile().params})


def _other_defaults() -> dict[str, Any]:
    """Return column → default of a job's required columns that `_JOBS` does not name."""
    return {
        column.name: column.default.arg
        for column in Job.__table__.columns
        if isinstance(column.default, ScalarElementColumnDefault)
        and not re.search(rf"\b{column.name}\b", _JOBS)
    }


class _Fragment:
    """A piece of SQL around an expression, which stands in a template as `{name:expression}`."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __format__(self, expression: str) -> str:
        return self._pattern.format(expression)

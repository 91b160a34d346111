"""Services that were lived in, their backups, and a look at both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import select

import migrations
from core import auth, jobs, registry
from core.backup import create_backup
from core.config import Settings
from core.db.models import Base, JobLog, JobSource, Webhook
from core.db.session import Database
from core.principal import LOCAL
from core.storage import ArtifactStore, LocalStore
from tests.support.factories import (
    add_base_model,
    add_dataset,
    add_project,
    must_claim,
    publish_artifact,
    queue_job,
)

# Exports are left out of a backup: they can be made again.
TRANSIENT = {"exports", "leases", "workers"}


def live_in(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> dict[str, str]:
    """Rows in every table, among them a key, a secret, a running job and a checkpoint."""
    add_base_model(database, path=str(tmp_path / "gone"))
    other = add_project(database, "robots")
    with database.session(write=True) as session:
        _, secret = auth.create_key(session, "robots", "laptop", ["admin"])
        session.add(
            Webhook(
                id="webhook-1",
                project_id=other.project_id,
                url="https://example.org/",
                secret="whsec_x",
                events=["job.succeeded"],
            )
        )
    dataset = add_dataset(database, store, content='{"text": "Grüße 🎵"}\n'.encode())
    digest = publish_version(database, store, tmp_path / "artifact")
    job = queue_job(database, store, settings, key="again")
    with database.session(write=True) as session:
        session.add(
            JobSource(
                job_id=job.id,
                position=0,
                role="training",
                reference=job.dataset,
                dataset_id=job.dataset,
            )
        )
    claim = must_claim(database, "worker-1")
    jobs.record(
        database,
        claim,
        "worker-1",
        [jobs.MetricUpdate(step=1, loss=0.1 + 0.2), jobs.EventUpdate("log", {"data": "é"})],
    )
    with database.session(write=True) as session:
        session.add(JobLog(job_id=job.id, end_byte=7, attempt=claim.attempt, text="Grüß\n"))
    checkpoint = store.write_blob([b"state"], 100)
    jobs.add_checkpoint(database, claim, "worker-1", step=1, blob=checkpoint, store=store)
    return {
        "job": job.id,
        "dataset": dataset.id,
        "digest": digest,
        "key": secret,
        "checkpoint": checkpoint.sha256,
    }


def live_in_a_little(database: Database, store: ArtifactStore) -> None:
    """Add a base model and a data set."""
    add_base_model(database)
    add_dataset(database, store)


def backup(database: Database, store: ArtifactStore, target: Path) -> Path:
    """Make a backup and return where it is."""
    create_backup(database, store, migrations.head(), target)
    return target


def rows_of(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Return table → rows of all that a backup holds."""
    with database.session() as session:
        return {
            table.name: [
                dict(row._mapping)
                for row in session.execute(select(table).order_by(*table.primary_key.columns))
            ]
            for table in Base.metadata.sorted_tables
            if table.name not in TRANSIENT
        }


def read_table(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a table as they are in a backup."""
    lines = (root / "tables" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def publish_version(database: Database, store: ArtifactStore, path: Path) -> str:
    """Publish an adapter and return its digest."""
    published = publish_artifact(store, path)
    with database.session(write=True) as session:
        registry.publish(
            session,
            project_id=LOCAL.project_id,
            name="bot",
            base_model="tiny",
            manifest=published.manifest,
            bytes=published.bytes,
            origin="import",
            job_id=None,
            provenance={"note": None, "nested": {"a": [1, 2.5]}},
            store=store,
        )
    return published.digest


def put_foreign_blob(store: ArtifactStore) -> ArtifactStore:
    """Store bytes that belong to nobody; return the store."""
    store.write_blob([b"another's"], 100)
    return store


def write_old_backup(root: Path) -> None:
    """Write a backup as it would look of the first schema, with a running job."""
    from core.backup.layout import FileEntry, Manifest, TableEntry, write_file
    from core.db.models import utc_now

    now = utc_now().isoformat()
    tables: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "projects": (
            {"id": "text", "name": "text", "created_at": "time"},
            {"id": "project-default", "name": "default", "created_at": now},
        ),
        "jobs": (
            {
                "id": "text", "project_id": "text", "dataset_id": "text", "base_model": "text",
                "adapter_name": "text", "spec": "json", "priority": "integer", "status": "text",
                "attempt": "integer", "lost_attempts": "integer", "worker_id": "text",
                "lease_expires_epoch": "real", "cancel_requested": "boolean", "stage": "text",
                "step": "integer", "trained_tokens": "integer", "last_event": "integer",
                "created_at": "time",
            },
            {
                "id": "job-1", "project_id": "project-default", "dataset_id": "file-1",
                "base_model": "tiny", "adapter_name": "bot", "spec": {}, "priority": 7,
                "status": "running", "attempt": 2, "lost_attempts": 0, "worker_id": "w",
                "lease_expires_epoch": 9e9, "cancel_requested": False, "stage": "train",
                "step": 4, "trained_tokens": 12, "last_event": 0, "created_at": now,
            },
        ),
    }  # fmt: skip
    entries, files = list[TableEntry](), list[FileEntry]()
    for name, (kinds, row) in tables.items():
        entries.append(TableEntry.model_validate({"name": name, "rows": 1, "columns": kinds}))
        files.append(write_file(root, f"tables/{name}.jsonl", [json.dumps(row).encode() + b"\n"]))
    manifest = Manifest(created_at=utc_now(), revision="41ce9c9ad68a", tables=entries, files=files)
    (root / "manifest.json").write_text(manifest.model_dump_json())

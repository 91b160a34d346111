"""The validate stage: the dry run of a new job, before any accelerator is touched."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from core import jobs
from core.config import Settings
from core.queue import JobQueue
from core.specs import HUB_PREFIX, parse_hub_reference
from core.storage import ArtifactStore
from worker.lease import Conclude, Lease
from worker.sources import describe_source

VALIDATOR_ARGV = (sys.executable, "-m", "core.data.process")
_CHUNK_BYTES = 1024**2


class ValidateStage:
    """Checks a new job's rows with its base model's tokenizer and queues it for training.

    Args:
        settings: What may be fetched, and how much may be stored.
        store: Holds the rows.
        queue: Wakes the train workers.
    """

    name: Literal["validate", "train"] = "validate"

    def __init__(self, settings: Settings, store: ArtifactStore, queue: JobQueue) -> None:
        self._settings = settings
        self._store = store
        self._queue = queue

    def task(self, lease: Lease, work_dir: Path, stopping: threading.Event) -> dict[str, Any]:
        """Return the validator's task.

        Raises:
            NotFound: The rows are gone.
            Forbidden: A data set of the Hugging Face Hub may not be fetched any more.
        """
        claim = lease.claim
        sources, to_fetch = [], {}
        for source in claim.sources:
            if source.sha256:
                path = self._store.blob_path(source.sha256)
            elif source.reference.startswith(HUB_PREFIX):
                path = work_dir / f"fetched-{source.position}.parquet"
                to_fetch[source.position] = self._to_fetch(source)
            else:
                path = work_dir / "inline.jsonl"
                with path.open("w", encoding="ascii") as lines:
                    lines.writelines(json.dumps(row) + "\n" for row in claim.spec.rows or [])
            sources.append(describe_source(claim, source, str(path)))
        return {
            "spec": jobs.without_rows(claim.spec),
            "base": claim.base.model_dump(mode="json"),
            "sources": sources,
            "to_fetch": to_fetch,
            "examine": claim.dry_run,
        }

    def receive(self, lease: Lease, stopping: threading.Event) -> None:
        """Return nobody: a dry run makes no checkpoints."""

    def succeed(self, result: dict[str, Any], conclude: Conclude) -> None:
        """Queue the job with its report; a dry run has ended with it.

        Raises:
            LeaseLost: Another attempt owns the job.
            QuotaExceeded: The project would store too much with what was fetched for it.
        """
        report = dict(result)
        fetched = [
            jobs.FetchedRows(
                position=rows["position"],
                blob=self._store.write_blob(
                    _chunks(Path(rows["path"])), self._settings.max_upload_bytes
                ),
                report=rows["report"],
            )
            for rows in report.pop("fetched", [])
        ]
        conclude(
            jobs.validation_done,
            report=report,
            fetched=fetched,
            settings=self._settings,
            store=self._store,
        )
        self._queue.wake("train")

    def _to_fetch(self, source: jobs.SourceRef) -> dict[str, Any]:
        jobs.check_hub_reference(self._settings, source.reference)
        named = parse_hub_reference(source.reference)
        return {
            "repository": named.repository,
            "revision": named.revision,
            "split": source.split,
            "max_rows": self._settings.max_dataset_rows,
            "max_bytes": self._settings.max_upload_bytes,
        }


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk

"""The validate stage: the dry run of a new job, before any accelerator is touched."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from core import jobs
from core.queue import JobQueue
from core.storage import ArtifactStore
from worker.lease import Conclude, Lease

VALIDATOR_ARGV = (sys.executable, "-m", "core.data.process")


class ValidateStage:
    """Checks a new job's rows with its base model's tokenizer and queues it for training.

    Args:
        store: Holds the rows.
        queue: Wakes the train workers.
    """

    name: Literal["validate", "train"] = "validate"

    def __init__(self, store: ArtifactStore, queue: JobQueue) -> None:
        self._store = store
        self._queue = queue

    def task(self, lease: Lease, work_dir: Path, stopping: threading.Event) -> dict[str, Any]:
        """Return the validator's task.

        Raises:
            NotFound: The rows are gone.
        """
        claim = lease.claim
        if claim.spec.rows is None:
            path = self._store.blob_path(claim.dataset_sha256)
        else:
            path = work_dir / "inline.jsonl"
            with path.open("w", encoding="ascii") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in claim.spec.rows)
        return {
            "spec": jobs.without_rows(claim.spec),
            "base": claim.base.model_dump(mode="json"),
            "data_path": str(path),
            "data_format": claim.dataset_format or None,
            "examine": claim.dry_run,
        }

    def receive(self, lease: Lease, stopping: threading.Event) -> None:
        """Return nobody: a dry run makes no checkpoints."""

    def succeed(self, result: dict[str, Any], conclude: Conclude) -> None:
        """Queue the job with its report; a dry run has ended with it.

        Raises:
            LeaseLost: Another attempt owns the job.
        """
        conclude(jobs.validation_done, report=result)
        self._queue.wake("train")

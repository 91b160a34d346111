"""The train stage: what the trainer gets of a job, and what becomes of its result."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from core import jobs
from core.config import Settings
from core.errors import NotFound, Unavailable
from core.storage import ArtifactStore
from worker.checkpoints import CheckpointUploader, restore_newest
from worker.lease import Conclude, Lease
from worker.sources import locate_sources

TRAINER_ARGV = (sys.executable, "-m", "core.training.process")


class TrainStage:
    """Trains a queued job's adapter and publishes it.

    Args:
        settings: Device, threads and what may be logged.
        store: Holds the rows and receives the adapter.
    """

    name: Literal["validate", "train"] = "train"

    def __init__(self, settings: Settings, store: ArtifactStore) -> None:
        self._settings = settings
        self._store = store

    def task(self, lease: Lease, work_dir: Path, stopping: threading.Event) -> dict[str, Any]:
        """Return the trainer's task, with the newest checkpoint that is whole.

        Raises:
            NotFound: The rows are gone, or the adapter to go on from.
            LeaseLost: Another attempt owns the job.
        """
        claim = lease.claim
        resume_dir = work_dir / "resume"
        checkpoint = restore_newest(
            claim,
            self._store,
            resume_dir,
            lambda found, reason: lease.write(
                jobs.reject_checkpoint, stopping, checkpoint=found, reason=reason
            ),
        )
        lease.write(jobs.begin_training, stopping, resumed=checkpoint)
        return {
            "job_id": claim.job_id,
            "attempt": claim.attempt,
            "spec": claim.spec.model_dump(mode="json"),
            "base": claim.base.model_dump(mode="json"),
            "sources": locate_sources(claim, self._store),
            "work_dir": str(work_dir),
            "continue_dir": self._continue_dir(claim.continue_digest),
            "resume_dir": str(resume_dir) if checkpoint else None,
            "memory_rung": claim.memory_rung,
            "device": self._settings.device,
            "threads": self._settings.trainer_threads or os.cpu_count() or 1,
            "mlflow_uri": self._settings.tracking_mlflow_uri,
            "tensorboard_dir": self._settings.tracking_tensorboard_dir,
        }

    def _continue_dir(self, digest: str | None) -> str | None:
        if digest is None:
            return None
        try:
            return str(self._store.adapter_path(digest))
        except NotFound as error:
            raise NotFound(
                "the adapter to go on from is gone",
                code="continue_missing",
                field="continue_from",
                hint="Submit the job again with an adapter that is there.",
            ) from error

    def receive(self, lease: Lease, stopping: threading.Event) -> CheckpointUploader:
        """Return who stores the checkpoints of an attempt."""
        return CheckpointUploader(lease, self._store, stopping)

    def succeed(self, result: dict[str, Any], conclude: Conclude) -> None:
        """Publish the adapter: its files first, then version, alias and success in one.

        Raises:
            InvalidInput: The trainer's files do not match their manifest.
            LeaseLost: Another attempt owns the job.
        """
        try:
            self._publish(result, conclude)
        except Unavailable:
            # An equal adapter was deleted at this very moment, and its files with it.
            self._publish(result, conclude)

    def _publish(self, result: dict[str, Any], conclude: Conclude) -> None:
        published = self._store.publish_adapter(Path(result["artifact_dir"]))
        conclude(
            jobs.succeed,
            manifest=published.manifest,
            bytes=published.bytes,
            report=result["report"],
            provenance=result["provenance"],
            store=self._store,
        )

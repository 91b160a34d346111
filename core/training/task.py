"""The input of the trainer: a job, its base model and its data, all on this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from core.data.sources import DataSource
from core.inference.engine import BaseModelRef
from core.specs import LAST_RUNG, JobSpec


class TrainTask(BaseModel):
    """One attempt at a job.

    Attributes:
        job_id: The job.
        attempt: Number of the attempt.
        spec: What to do.
        base: The base model's directory.
        sources: Where the rows come from.
        work_dir: A directory of this attempt, emptied by the caller; the artifact is made in it.
        continue_dir: The artifact whose weights training begins with.
        resume_dir: Holds the checkpoint that the attempt goes on from; absent, it starts anew.
        memory_rung: How far down the memory ladder the attempt is.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        threads: Torch threads on the CPU; 0 is all cores.
        mlflow_uri: Where MLflow tracks, for jobs that report to it.
        tensorboard_dir: Where TensorBoard's event files go, likewise.
    """

    model_config = ConfigDict(frozen=True)
    job_id: str
    attempt: int
    spec: JobSpec
    base: BaseModelRef
    sources: list[DataSource]
    work_dir: Path
    continue_dir: Path | None = None
    resume_dir: Path | None = None
    memory_rung: int = Field(0, ge=0, le=LAST_RUNG)
    device: str = "auto"
    threads: int = 0
    mlflow_uri: str = ""
    tensorboard_dir: str = ""

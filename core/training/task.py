"""The input of the trainer: a job, its base model and its data, all on this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from core.data.detect import DatasetFormat
from core.inference.engine import BaseModelRef
from core.specs import LAST_RUNG, JobSpec


class TrainTask(BaseModel):
    """One attempt at a job.

    Attributes:
        job_id: The job.
        attempt: Number of the attempt.
        spec: What to do.
        base: The base model's directory.
        data_path: The data set's file.
        data_format: Its format; found from the rows when absent.
        work_dir: A directory of this attempt, emptied by the caller; the artifact is made in it.
        resume_dir: Holds the checkpoint that the attempt goes on from; absent, it starts anew.
        memory_rung: How far down the memory ladder the attempt is.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        threads: Torch threads on the CPU; 0 is all cores.
    """

    model_config = ConfigDict(frozen=True)
    job_id: str
    attempt: int
    spec: JobSpec
    base: BaseModelRef
    data_path: Path
    data_format: DatasetFormat | None = None
    work_dir: Path
    resume_dir: Path | None = None
    memory_rung: int = Field(0, ge=0, le=LAST_RUNG)
    device: str = "auto"
    threads: int = 0

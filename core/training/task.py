"""The input of the trainer: a job, its base model and its data, all on this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from core.data.detect import DatasetFormat
from core.inference.engine import BaseModelRef
from core.specs import JobSpec


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
    device: str = "auto"
    threads: int = 0

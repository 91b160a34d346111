"""Where a job's rows come from: files, each with its part in the job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from core.data.detect import DatasetFormat

SourceRole = Literal["training", "validation"]


class DataSource(BaseModel):
    """One file of rows.

    Attributes:
        path: An accepted file; see `core.data.ingest`.
        format: Of its rows; found from the first one when absent.
        name: What findings call it; empty when it is the only one.
        role: Whether its rows are learnt or measured on. A validation source follows all others.
        weight: How often an epoch sees each of its rows.
    """

    model_config = ConfigDict(frozen=True)
    path: Path
    format: DatasetFormat | None = None
    name: str = ""
    role: SourceRole = "training"
    weight: float = 1.0

"""What a check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found; `fail` keeps the service from working, `warn` may."""

    name: str
    status: Status
    detail: str
    hint: str | None = None

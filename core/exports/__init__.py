"""Exports of adapter versions: whole models for other programs.

Owns what may be asked for and how an export goes from `queued` to its file. The merge itself is in
`core.training.merging`, which runs in a child of the light worker.
"""

from core.exports.leases import (
    ExportClaim,
    claim,
    fail,
    hand_back,
    held_attempts,
    is_due,
    renew,
    succeed,
)
from core.exports.requests import (
    ExportDtype,
    ExportFormat,
    delete_export,
    get_export,
    list_exports,
    locate_file,
    submit_export,
)

__all__ = [
    "ExportClaim",
    "ExportDtype",
    "ExportFormat",
    "claim",
    "delete_export",
    "fail",
    "get_export",
    "hand_back",
    "held_attempts",
    "is_due",
    "list_exports",
    "locate_file",
    "renew",
    "submit_export",
    "succeed",
]

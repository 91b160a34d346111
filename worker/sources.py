"""The data sets of a claimed job as files on this machine."""

from __future__ import annotations

from typing import Any

from core import jobs
from core.storage import ArtifactStore


def locate_sources(claim: jobs.Claim, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return a job's data sets as its child takes them; all have been stored.

    Raises:
        NotFound: The bytes of one are gone.
    """
    return [
        describe_source(claim, source, str(store.blob_path(source.sha256)))
        for source in claim.sources
    ]


def describe_source(claim: jobs.Claim, source: jobs.SourceRef, path: str) -> dict[str, Any]:
    """Return one data set as a child takes it."""
    return {
        "path": path,
        "format": source.format,
        # Findings of an only data set need not say which.
        "name": source.name if len(claim.sources) > 1 else "",
        "role": source.role,
        "weight": source.weight,
    }

"""The version of this service."""

from __future__ import annotations

from importlib import metadata


def service_version() -> str:
    """Return the installed version; `0` when it runs from a checkout that is not installed."""
    try:
        return metadata.version("tunesmith")
    except metadata.PackageNotFoundError:
        return "0"

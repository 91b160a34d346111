"""Looks for what keeps the service from working on this machine, part by part.

Every check says what it found and, where that is not well, what to do. Changes nothing but a
temporary file or object; the model libraries are asked in a process of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from core.config import Settings
from service.doctor import machine, parts
from service.doctor.finding import Finding

__all__ = ["Finding", "examine"]


def examine(settings: Settings, *, port: int, deep: bool) -> Iterator[Finding]:
    """Yield the findings of all checks.

    Args:
        settings: Of the service.
        port: The port that the API has or shall have.
        deep: Compare all files of the base models with their digests.
    """
    yield machine.check_python()
    yield from machine.check_packages()
    yield machine.check_model_libraries()
    yield machine.check_memory()
    yield machine.check_data_directory(settings.root)
    yield machine.check_disk(settings.root)
    yield parts.check_broker(settings)
    yield parts.check_artifact_store(settings)
    yield from parts.check_database(settings, deep=deep)
    for address in settings.engine_addresses:
        yield parts.check_engine(address)
    yield machine.check_port(port)

"""The registry: adapters, their immutable versions and movable aliases.

A bare adapter name means its alias `latest`. Files are shared between equal digests of all
projects, so a deletion removes rows first and files only when no row refers to them. Knows no HTTP
and no engine.
"""

from core.reads import AdapterRead, Page, VersionRead
from core.registry.pins import PinnedVersion, list_pinned, set_pin
from core.registry.promotion import Promotion, decide
from core.registry.publishing import import_adapter, move_alias, publish, release, remove_alias
from core.registry.references import LATEST, ResolvedAdapter, resolve
from core.registry.retirement import (
    delete_adapter,
    delete_version,
    discard_artifact,
    unreferenced_digest,
)
from core.registry.views import get_adapter, get_version, list_adapters, list_versions

__all__ = [
    "LATEST",
    "AdapterRead",
    "Page",
    "PinnedVersion",
    "Promotion",
    "ResolvedAdapter",
    "VersionRead",
    "decide",
    "delete_adapter",
    "delete_version",
    "discard_artifact",
    "get_adapter",
    "get_version",
    "import_adapter",
    "list_adapters",
    "list_pinned",
    "list_versions",
    "move_alias",
    "publish",
    "release",
    "remove_alias",
    "resolve",
    "set_pin",
    "unreferenced_digest",
]

"""New versions and where aliases point."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from core import failpoints
from core.artifacts import Manifest
from core.db.models import AdapterVersion
from core.db.repositories.adapters import AdapterRepository
from core.db.repositories.dialect import lock_content
from core.errors import Conflict, InvalidInput, NotFound, Unavailable
from core.ids import new_id
from core.principal import Principal
from core.reads import AdapterRead, VersionRead
from core.registry.promotion import Promotion
from core.registry.references import LATEST, NAME_HINT, is_name
from core.registry.views import get_adapter, get_version, version_row
from core.storage import ArtifactStore, PublishedAdapter
from core.webhooks.outbox import tell_of_adapter


def publish(
    session: Session,
    *,
    project_id: str,
    name: str,
    base_model: str,
    manifest: Manifest,
    bytes: int,  # noqa: A002 (named as the column it fills)
    origin: Literal["job", "import"],
    job_id: str | None,
    provenance: dict[str, Any],
    store: ArtifactStore,
    promotion: Promotion = Promotion(),
) -> AdapterVersion:
    """Add the next version of an adapter and, where it is promoted, move `latest` to it.

    Args:
        session: Opened with `write=True`.
        project_id: The owner.
        name: The adapter; made if new.
        base_model: Name of the base model it was trained on.
        manifest: Of the artifact.
        bytes: Size of the artifact's files.
        origin: Where it came from.
        job_id: The job that trained it; a job publishes once.
        provenance: How it came about; not part of the digest.
        store: Holds the artifact.
        promotion: What becomes of it.

    Raises:
        Unavailable: Code `artifact_gone`; an equal artifact was deleted meanwhile: store it again.
    """
    # From here on nobody can find these files unreferenced and delete them.
    lock_content(session, manifest.digest)
    adapters = AdapterRepository(session, project_id)
    adapter_id, number = adapters.next_version(name)
    version = AdapterVersion(
        id=new_id("version"),
        project_id=project_id,
        adapter_id=adapter_id,
        version=number,
        digest=manifest.digest,
        bytes=bytes,
        base_model=base_model,
        base_digest=manifest.base_digest,
        origin=origin,
        job_id=job_id,
        manifest=manifest.model_dump(mode="json"),
        provenance=provenance,
        quarantine=promotion.quarantine,
    )
    adapters.add(version)
    failpoints.reached("publish.alias", job_id=job_id)
    if promotion.promoted:
        adapters.point(adapter_id, LATEST, version.id)
    if not store.has_adapter(manifest.digest):
        raise Unavailable(
            "the adapter was deleted while it was published",
            code="artifact_gone",
            hint="Publish it again.",
        )
    tell_of_adapter(session, name, version, promoted=promotion.promoted)
    return version


def import_adapter(
    session: Session,
    principal: Principal,
    *,
    name: str,
    published: PublishedAdapter,
    base_model: str,
    provenance: dict[str, Any],
    store: ArtifactStore,
) -> VersionRead:
    """Register an uploaded artifact, checked and stored already, as an adapter's next version.

    Raises:
        InvalidInput: Code `invalid_adapter_name`.
        Unavailable: Code `artifact_gone`.
    """
    if not is_name(name):
        raise InvalidInput(
            f"{name[:80]!r} cannot be an adapter's name",
            code="invalid_adapter_name",
            field="name",
            hint=NAME_HINT,
        )
    version = publish(
        session,
        project_id=principal.project_id,
        name=name,
        base_model=base_model,
        manifest=published.manifest,
        bytes=published.bytes,
        origin="import",
        job_id=None,
        provenance=provenance,
        store=store,
    )
    return get_version(session, principal, name, version.version)


def move_alias(
    session: Session, principal: Principal, name: str, alias: str, version: int
) -> AdapterRead:
    """Point an alias at a version: promote, or roll back.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        alias: The alias; made if new.
        version: Where it shall point.

    Raises:
        InvalidInput: Code `invalid_alias`.
        NotFound: Code `unknown_adapter` or `unknown_version`.
        Conflict: Code `version_quarantined`.
    """
    if not is_name(alias):
        raise InvalidInput(
            f"{alias[:80]!r} cannot be an alias",
            code="invalid_alias",
            field="alias",
            hint=NAME_HINT,
        )
    adapters = AdapterRepository(session, principal.project_id)
    adapter = adapters.get(name, lock=True)
    row = version_row(adapters, name, version)
    if row.quarantine is not None:
        raise Conflict(
            f"version {version} of {name!r} is quarantined: {row.quarantine}",
            code="version_quarantined",
            field="version",
            hint=f"POST /adapters/{name}/versions/{version}/release lifts that, if you are sure.",
        )
    adapters.point(adapter.id, alias, row.id)
    return get_adapter(session, principal, name)


def release(session: Session, principal: Principal, name: str, version: int) -> VersionRead:
    """Let aliases point at a quarantined version; one that is not quarantined stays as it is.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        version: The version.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_version`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    adapters.get(name, lock=True)
    version_row(adapters, name, version).quarantine = None
    session.flush()
    return get_version(session, principal, name, version)


def remove_alias(session: Session, principal: Principal, name: str, alias: str) -> None:
    """Remove an alias; the version it points at stays.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        alias: The alias.

    Raises:
        Conflict: Code `latest_is_fixed`; `latest` can only be moved.
        NotFound: Code `unknown_adapter` or `unknown_alias`.
    """
    if alias == LATEST:
        raise Conflict(
            f"the alias {LATEST!r} cannot be removed",
            code="latest_is_fixed",
            hint="Move it to another version instead.",
        )
    adapters = AdapterRepository(session, principal.project_id)
    adapter = adapters.get(name, lock=True)
    if not is_name(alias) or not adapters.remove_alias(adapter.id, alias):
        raise NotFound(f"{name!r} has no alias {alias[:80]!r}", code="unknown_alias")

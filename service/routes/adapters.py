"""Adapters: names, immutable versions, aliases, adapter_files."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response, status
from starlette.responses import StreamingResponse

from core import registry
from core.reads import AdapterRead, Page, VersionRead
from core.specs import AdapterName, ModelName
from service import adapter_files, pins
from service.auth import Admin, Reader, Trainer
from service.deps import (
    CheckedBody,
    Cursor,
    Limit,
    ReadSession,
    ServicesDep,
    VersionNumber,
    WriteSession,
)
from service.openapi import problems, upload_body
from service.schemas import AliasBody
from service.uploads import consume_upload

router = APIRouter(prefix="/adapters", tags=["adapters"])

Force = Annotated[
    bool,
    Query(description="Delete although aliases point at it; they move to the newest one left."),
]
Alias = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="Alias.")]


@router.get("", summary="List adapters", responses=problems(401, 403, 422))
def list_adapters(
    session: ReadSession, principal: Reader, cursor: Cursor = None, limit: Limit = 50
) -> Page[AdapterRead]:
    """Return adapters, newest first."""
    return registry.list_adapters(session, principal, cursor=cursor, limit=limit)


@router.post(
    "/import",
    status_code=status.HTTP_201_CREATED,
    summary="Import an adapter",
    responses=problems(401, 403, 409, 413, 422, 503),
    openapi_extra=upload_body("application/gzip", None),
)
async def import_adapter(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: Trainer,
    name: Annotated[AdapterName, Query(description="Name to publish under.")],
    base_model: Annotated[ModelName, Query(description="The base model it was trained on.")],
) -> VersionRead:
    """Publish a PEFT LoRA directory, sent as tar.gz, as the next version of `name`.

    Only safetensors weights of plain LoRA on literally named modules pass; the engine loads the
    adapter once before it is published, as it does for a trained one.
    """
    candidate = await consume_upload(
        request,
        lambda upload: adapter_files.receive(services, upload, base_model),
        slots=services.upload_slots,
    )
    version = await adapter_files.publish(services, principal, candidate, name)
    response.headers["Location"] = f"/adapters/{name}/versions/{version.version}"
    return version


@router.get("/{name}", summary="Read an adapter", responses=problems(401, 403, 404))
def get_adapter(name: str, session: ReadSession, principal: Reader) -> AdapterRead:
    """Return an adapter with its aliases."""
    return registry.get_adapter(session, principal, name)


@router.delete(
    "/{name}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete an adapter",
    responses=problems(401, 403, 404, 409),
)
async def delete_adapter(
    name: str, services: ServicesDep, principal: Trainer, force: Force = False
) -> None:
    """Remove an adapter with all its versions; refused while aliases exist unless forced."""
    await adapter_files.delete_adapter(services, principal, name, force)


@router.get("/{name}/versions", summary="List versions", responses=problems(401, 403, 404, 422))
def list_versions(
    name: str,
    session: ReadSession,
    principal: Reader,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[VersionRead]:
    """Return an adapter's versions, newest first."""
    return registry.list_versions(session, principal, name, cursor=cursor, limit=limit)


@router.get(
    "/{name}/versions/{version}", summary="Read a version", responses=problems(401, 403, 404, 422)
)
def get_version(
    name: str, version: VersionNumber, session: ReadSession, principal: Reader
) -> VersionRead:
    """Return a version with its manifest and provenance."""
    return registry.get_version(session, principal, name, version)


@router.delete(
    "/{name}/versions/{version}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a version",
    responses=problems(401, 403, 404, 409, 422),
)
async def delete_version(
    name: str,
    version: VersionNumber,
    services: ServicesDep,
    principal: Trainer,
    force: Force = False,
) -> None:
    """Remove a version; refused while an alias points at it unless forced."""
    await adapter_files.delete_version(services, principal, name, version, force)


@router.get(
    "/{name}/versions/{version}/download",
    summary="Download a version",
    response_class=StreamingResponse,
    responses={
        **problems(401, 403, 404, 422),
        200: {
            "description": "A tar.gz of the PEFT directory.",
            "content": {"application/gzip": {}},
        },
    },
)
def download_version(
    name: str, version: VersionNumber, services: ServicesDep, principal: Reader
) -> Any:
    """Return the files as PEFT loads them, tokenizer and template included."""
    return adapter_files.download(services, principal, name, version)


@router.post(
    "/{name}/versions/{version}/release",
    summary="Release a quarantined version",
    responses=problems(401, 403, 404, 422),
)
def release_version(
    name: str, version: VersionNumber, session: WriteSession, principal: Trainer
) -> VersionRead:
    """Let aliases point at a version that `promote: if_better` found no better.

    It moves no alias by itself. A version that is not quarantined stays as it is.
    """
    return registry.release(session, principal, name, version)


@router.put(
    "/{name}/aliases/{alias}",
    summary="Move an alias",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 404, 409, 422),
)
def move_alias(
    name: str, alias: Alias, body: AliasBody, session: WriteSession, principal: Trainer
) -> AdapterRead:
    """Make an alias point at a version: promote, or roll back.

    `latest` is what a bare adapter name means. Running requests finish on the version they began
    with. A quarantined version is refused (`version_quarantined`) until it is released.
    """
    return registry.move_alias(session, principal, name, alias, body.version)


@router.put(
    "/{name}/aliases/{alias}/pin",
    summary="Pin an alias",
    responses=problems(401, 403, 404, 409, 422, 503),
)
async def pin_alias(
    name: str, alias: Alias, services: ServicesDep, principal: Admin
) -> AdapterRead:
    """Load what an alias points at into the engine, and have it stay there.

    When the alias moves, what it points at then is loaded within seconds, and so it is when the
    engine was restarted. Pinned adapters may take half of the engine's bank.
    """
    return await pins.pin(services, principal, name, alias)


@router.delete(
    "/{name}/aliases/{alias}/pin",
    summary="Unpin an alias",
    responses=problems(401, 403, 404, 422),
)
async def unpin_alias(
    name: str, alias: Alias, services: ServicesDep, principal: Admin
) -> AdapterRead:
    """Let the engine forget what an alias points at when nobody uses it."""
    return await pins.unpin(services, principal, name, alias)


@router.delete(
    "/{name}/aliases/{alias}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Remove an alias",
    responses=problems(401, 403, 404, 409, 422),
)
def remove_alias(name: str, alias: Alias, session: WriteSession, principal: Trainer) -> None:
    """Remove an alias; `latest` can only be moved."""
    registry.remove_alias(session, principal, name, alias)

"""Exports: whole models made of adapter versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response, status
from starlette.responses import FileResponse

from core import exports
from core.reads import ExportRead, Page
from service.auth import Reader, Trainer
from service.deps import (
    CheckedBody,
    Cursor,
    Limit,
    ReadSession,
    ServicesDep,
    VersionNumber,
    WriteSession,
)
from service.openapi import problems
from service.schemas import ExportBody

router = APIRouter(prefix="/adapters/{name}/versions/{version}/exports", tags=["adapters"])


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    summary="Export a version",
    dependencies=[CheckedBody],
    responses=problems(400, 401, 403, 404, 422, 429),
)
def submit_export(
    name: str,
    version: VersionNumber,
    body: ExportBody,
    response: Response,
    services: ServicesDep,
    session: WriteSession,
    principal: Trainer,
) -> ExportRead:
    """Have a light worker merge the version into its base model.

    The same request again is answered with the export that there is. The file is kept for
    `TUNESMITH_KEEP_EXPORTS_SECONDS` and counts towards the project's `stored_bytes`: one that would
    not fit is refused with 403 `quota_exceeded`.
    """
    export = exports.submit_export(
        session,
        principal,
        name,
        version,
        format=body.format,
        dtype=body.dtype,
        settings=services.settings,
    )
    response.headers["Location"] = f"/adapters/{name}/versions/{version}/exports/{export.id}"
    return export


@router.get("", summary="List exports", responses=problems(401, 403, 404, 422))
def list_exports(
    name: str,
    version: VersionNumber,
    session: ReadSession,
    principal: Reader,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[ExportRead]:
    """Return a version's exports, newest first."""
    return exports.list_exports(session, principal, name, version, cursor=cursor, limit=limit)


@router.get("/{export_id}", summary="Read an export", responses=problems(401, 403, 404, 422))
def get_export(
    name: str, version: VersionNumber, export_id: str, session: ReadSession, principal: Reader
) -> ExportRead:
    """Return an export: how far it is, and the size and hash of its file."""
    return exports.get_export(session, principal, name, version, export_id)


@router.delete(
    "/{export_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete an export",
    responses=problems(401, 403, 404, 422),
)
def delete_export(
    name: str, version: VersionNumber, export_id: str, services: ServicesDep, principal: Trainer
) -> None:
    """Remove an export with its file; one that is being made is given up."""
    exports.delete_export(services.database, services.store, principal, name, version, export_id)


@router.get(
    "/{export_id}/download",
    summary="Download an export",
    response_class=FileResponse,
    responses={
        **problems(401, 403, 404, 409, 422),
        200: {
            "description": "The file; a Range gives a part of it.",
            "content": {"application/octet-stream": {}},
        },
        304: {"description": "The file is the one of If-None-Match."},
    },
)
def download_export(
    name: str,
    version: VersionNumber,
    export_id: str,
    services: ServicesDep,
    principal: Reader,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return the file; its ETag is its SHA-256, and a broken download can go on by Range."""
    with services.database.session() as session:
        export = exports.get_export(session, principal, name, version, export_id)
    path, filename = exports.locate_file(export, services.store)
    headers = {"ETag": f'"{export.sha256}"'}
    if if_none_match == headers["ETag"]:
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    return FileResponse(
        path, media_type="application/octet-stream", filename=filename, headers=headers
    )

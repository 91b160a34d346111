"""Data sets: upload, list, look into, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, status

from core import datasets
from core.reads import DatasetRead, Page
from service import dataset_files
from service.auth import Reader, Trainer
from service.deps import Cursor, Limit, Offset, ReadSession, ServicesDep
from service.openapi import problems, upload_body
from service.schemas import RowRead
from service.uploads import consume_upload

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Upload a data set",
    responses=problems(401, 403, 413, 422),
    openapi_extra=upload_body(
        "application/jsonl",
        '{"messages": [{"role": "user", "content": "Hi"}, '
        '{"role": "assistant", "content": "Hello!"}]}\n',
    ),
)
async def upload_dataset(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: Trainer,
    filename: Annotated[
        str, Query(max_length=255, description="Name of the file if the body is the file itself.")
    ] = "",
) -> DatasetRead:
    """Store a file of training rows (JSONL, JSON, CSV or Parquet), after checking every row.

    Send it as multipart field `file`, or as the raw body with `?filename=`. A file with a bad row
    is refused as a whole: `invalid_dataset` lists the lines, and nothing is kept. A file that lacks
    a field of every format is stored as `unknown`, for jobs that name its columns.
    """
    dataset = await consume_upload(
        request,
        lambda upload: dataset_files.store_dataset(services, principal, upload),
        slots=services.upload_slots,
        filename=filename,
    )
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


@router.get("", summary="List data sets", responses=problems(401, 403, 422))
def list_datasets(
    session: ReadSession, principal: Reader, cursor: Cursor = None, limit: Limit = 50
) -> Page[DatasetRead]:
    """Return data sets, newest first."""
    return datasets.list_datasets(session, principal, cursor=cursor, limit=limit)


@router.get("/{dataset_id}", summary="Read a data set", responses=problems(401, 403, 404))
def get_dataset(dataset_id: str, session: ReadSession, principal: Reader) -> DatasetRead:
    """Return a data set with its validation report."""
    return datasets.get(session, principal, dataset_id)


@router.get("/{dataset_id}/rows", summary="Preview rows", responses=problems(401, 403, 404, 422))
def preview_rows(
    dataset_id: str,
    services: ServicesDep,
    principal: Reader,
    offset: Offset = 0,
    limit: Limit = 20,
) -> dict[str, list[RowRead]]:
    """Return rows with their line numbers, from `offset` on."""
    return {"data": dataset_files.preview(services, principal, dataset_id, offset, limit)}


@router.delete(
    "/{dataset_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Delete a data set",
    responses=problems(401, 403, 404, 409),
)
def delete_dataset(dataset_id: str, services: ServicesDep, principal: Trainer) -> None:
    """Remove a data set; refused with `dataset_in_use` while a job needs it."""
    dataset_files.delete_dataset(services, principal, dataset_id)

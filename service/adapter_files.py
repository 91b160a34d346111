"""Adapters as tar.gz: taken in through the gates, given out as PEFT loads them, and retired."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from core import base_models, quotas, registry
from core.errors import TunesmithError
from core.imports import prepare_import, unpack_archive
from core.inference.engine import AdapterRef, BaseModelRef
from core.principal import Principal
from core.reads import VersionRead
from core.storage import PublishedAdapter
from service.deps import Services
from service.uploads import Upload

_CHUNK_BYTES = 256 * 1024
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Candidate:
    """An uploaded adapter that is checked and stored, but neither loaded nor registered yet."""

    published: PublishedAdapter
    base_model: BaseModelRef
    filename: str


def receive(services: Services, upload: Upload, base_model: str) -> Candidate:
    """Unpack and check an uploaded archive, and store what it holds.

    Raises:
        NotFound: Code `unknown_base_model`.
        InvalidInput: The archive or a file in it is refused; see `core.imports`.
        TooLarge: It holds more than `max_adapter_bytes`.
    """
    with services.database.session() as session:
        base, description = base_models.describe(session, base_model)
    with tempfile.TemporaryDirectory(dir=services.settings.root / "tmp", prefix="import-") as name:
        directory = Path(name)
        archive = io.BufferedReader(_ChunkReader(iter(upload)))
        unpack_archive(archive, directory, services.settings.max_adapter_bytes)
        prepare_import(
            directory, description=description, base_digest=base.digest, base_path=Path(base.path)
        )
        published = services.store.publish_adapter(directory)
    return Candidate(published, base, upload.filename)


async def publish(
    services: Services, principal: Principal, candidate: Candidate, name: str
) -> VersionRead:
    """Load a candidate into the engine, as the last gate, and register it.

    Raises:
        Conflict: The engine's gates refuse it.
        Unavailable: The engine cannot be asked.
    """
    digest = candidate.published.digest
    try:
        await services.engine.load(candidate.base_model, AdapterRef(digest=digest))
        return await run_in_threadpool(_register, services, principal, candidate, name)
    except BaseException:
        # Whatever went wrong, a client that left included: no files without a version.
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(
                registry.discard_artifact, services.database, services.store, digest
            )
        raise


def download(
    services: Services, principal: Principal, name: str, version: int
) -> StreamingResponse:
    """Return a version's files as a tar.gz below one folder `NAME-vN/`.

    Equal versions give equal archives: order, owners and times are fixed.

    Raises:
        NotFound: No such version, or its files are gone.
    """
    with services.database.session() as session:
        found = registry.get_version(session, principal, name, version)
    files = services.store.open_adapter(found.digest)
    folder = f"{name}-v{version}"
    headers = {"Content-Disposition": f'attachment; filename="{folder}.tar.gz"'}
    return StreamingResponse(
        _archive(folder, files), media_type="application/gzip", headers=headers
    )


async def delete_version(
    services: Services, principal: Principal, name: str, version: int, force: bool
) -> None:
    """Retire a version, and its files and memory if no other version has the same.

    Raises:
        NotFound: No such version.
        Conflict: Code `alias_points_here`.
    """

    def delete() -> list[str]:
        with services.database.session(write=True) as session:
            return [registry.delete_version(session, principal, name, version, force=force)]

    await _discard(services, await run_in_threadpool(delete))


async def delete_adapter(services: Services, principal: Principal, name: str, force: bool) -> None:
    """Retire an adapter with all its versions; see `delete_version`."""

    def delete() -> list[str]:
        with services.database.session(write=True) as session:
            return registry.delete_adapter(session, principal, name, force=force)

    await _discard(services, await run_in_threadpool(delete))


def _register(
    services: Services, principal: Principal, candidate: Candidate, name: str
) -> VersionRead:
    with services.database.session(write=True) as session:
        quotas.check_storage(
            session, principal, services.settings, rows=0, bytes=candidate.published.bytes
        )
        return registry.import_adapter(
            session,
            principal,
            name=name,
            published=candidate.published,
            base_model=candidate.base_model.name,
            provenance={"filename": candidate.filename},
            store=services.store,
        )


async def _discard(services: Services, digests: list[str]) -> None:
    for digest in digests:
        gone = await run_in_threadpool(
            registry.discard_artifact, services.database, services.store, digest
        )
        if gone:
            # An engine that is down holds nothing.
            with suppress(TunesmithError):
                await services.engine.unload(digest)


class _ChunkReader(io.RawIOBase):
    """A stream over chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _archive(folder: str, files: dict[str, BinaryIO]) -> Iterator[bytes]:
    """Yield a gzipped tar of open files, and close them."""
    written = io.BytesIO()

    def taken() -> bytes:
        chunk = written.getvalue()
        written.seek(0)
        written.truncate()
        return chunk

    with ExitStack() as stack:
        for file in files.values():
            stack.enter_context(file)
        # Weights hardly compress; level 1 costs the least time for what there is.
        zipped = gzip.GzipFile(fileobj=written, mode="wb", compresslevel=1, filename="", mtime=0)
        for name, file in files.items():
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = size, 0o644
            zipped.write(entry.tobuf(tarfile.USTAR_FORMAT))
            while chunk := file.read(_CHUNK_BYTES):
                zipped.write(chunk)
                yield taken()
            zipped.write(bytes(-size % _BLOCK))
        zipped.write(bytes(2 * _BLOCK))
        zipped.close()
        yield taken()

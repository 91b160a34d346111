"""Uploads as streams: one file, sent as multipart field `file` or as the raw body.

Bytes go from the socket to the consumer in bounded chunks; nothing is spooled in between. The
consumer runs in a thread and pulls, so a slow disk slows the sender.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import anyio.from_thread
import anyio.to_thread
from anyio import CapacityLimiter
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from core.errors import InvalidInput

T = TypeVar("T")

UPLOAD_FIELD = "file"
# Boundaries and part headers on top of the file itself.
MULTIPART_OVERHEAD_BYTES = 64 * 1024
_MAX_FILENAME_LENGTH = 255
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class Upload:
    """One uploaded file; its bytes can be read once.

    Attributes:
        filename: As the client named it, without directories; known once reading has begun.
    """

    def __init__(self, chunks: Iterator[bytes], filename: str) -> None:
        self.filename = clean_filename(filename)
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


async def consume_upload(
    request: Request,
    consume: Callable[[Upload], T],
    *,
    slots: CapacityLimiter,
    filename: str = "",
) -> T:
    """Run `consume` in a thread over the request's file and return its result.

    Args:
        request: Its body must not have been read.
        consume: Reads the upload to its end.
        slots: Bounds the uploads at one time; further ones wait.
        filename: Name of the file if the body is the file itself.

    Raises:
        InvalidInput: Malformed multipart data, no `file` field, or more than that field.
    """
    stream = request.stream()
    content_type, parameters = parse_options_header(request.headers.get("content-type"))

    def run() -> T:
        chunks = _pull(stream)
        if content_type != b"multipart/form-data":
            return consume(Upload(chunks, filename))
        part = _FilePart(chunks, parameters.get(b"boundary", b""))
        return consume(Upload(part.chunks(), part.filename or filename))

    try:
        return await anyio.to_thread.run_sync(run, limiter=slots)
    finally:
        await stream.aclose()


def clean_filename(name: str) -> str:
    """Return the last component of an uploaded file's name, printable and of bounded length."""
    last = re.split(r"[/\\]", name)[-1]
    return _UNPRINTABLE.sub("", last)[-_MAX_FILENAME_LENGTH:].strip()


def _pull(stream: AsyncIterator[bytes]) -> Iterator[bytes]:
    """Iterate over an async stream from a thread that anyio started."""

    async def next_chunk() -> bytes | None:
        return await anext(stream, None)

    while (chunk := anyio.from_thread.run(next_chunk)) is not None:
        if chunk:
            yield chunk


class _FilePart:
    """The single file in multipart data, parsed as it arrives.

    Construction reads up to the start of the file, so that its name is known.
    """

    def __init__(self, source: Iterator[bytes], boundary: bytes) -> None:
        if not boundary:
            raise _malformed("the multipart body names no boundary")
        self.filename = ""
        self._source = source
        self._found = 0
        self._ended = False
        self._ready: list[bytes] = []
        self._header_bytes = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )
        while not self._found:
            if not self._advance():
                raise InvalidInput(
                    f"the form has no field '{UPLOAD_FIELD}'",
                    code="missing_file",
                    field=UPLOAD_FIELD,
                    hint=f"Send one file as multipart field '{UPLOAD_FIELD}', or as the raw body.",
                )

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes."""
        while True:
            ready, self._ready = self._ready, []
            yield from ready
            if not self._advance():
                break
        if not self._ended:
            raise _malformed("the multipart body ends too early")

    def _advance(self) -> bool:
        chunk = next(self._source, None)
        if chunk is None:
            return False
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed("the multipart body is malformed") from error
        return True

    def _on_part_begin(self) -> None:
        self._disposition, self._header_bytes = b"", 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += self._bounded(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += self._bounded(data[start:end])

    def _bounded(self, data: bytes) -> bytes:
        self._header_bytes += len(data)
        if self._header_bytes > MULTIPART_OVERHEAD_BYTES // 4:
            raise _malformed("the headers of a multipart part are too long")
        return data

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != UPLOAD_FIELD:
            raise InvalidInput(
                "the form has a field that is not known here",
                code="unknown_field",
                field=clean_filename(name)[:100] or None,
                hint=f"Send one file as multipart field '{UPLOAD_FIELD}' and nothing else.",
            )
        self._found += 1
        if self._found > 1:
            raise InvalidInput(
                "the form has more than one file", code="too_many_files", field=UPLOAD_FIELD
            )
        self.filename = clean_filename(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._ready.append(bytes(data[start:end]))

    def _on_end(self) -> None:
        self._ended = True


def _malformed(message: str) -> InvalidInput:
    return InvalidInput(
        message,
        code="invalid_multipart",
        hint=f"Send one file as multipart field '{UPLOAD_FIELD}'.",
    )

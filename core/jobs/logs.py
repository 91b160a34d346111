"""What a job's child has written: kept in bounded chunks, read from the end or from a place on.

A job has one log over all of its attempts. A line is known by the byte of the log at which it ends,
so ids grow, and what is behind one can be asked for whatever was dropped meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.orm import Session

from core.db.models import JobLog
from core.db.repositories.jobs import JobRepository
from core.db.repositories.logs import LogRepository
from core.job_status import TERMINAL
from core.principal import Principal
from core.reads import LogLine, LogPage

# A row is read and written as a whole.
_CHUNK_BYTES = 64 * 1024
_CHUNKS_PER_LOOK = 200
_LAST_BYTE = 2**62


def append(session: Session, job_id: str, attempt: int, lines: str, max_bytes: int) -> None:
    """Add lines to a job's log, and drop the oldest ones beyond a size.

    The caller holds the job's row, so that nobody else adds to the same log.

    Args:
        session: Opened with `write=True`.
        job_id: The job.
        attempt: Which of its attempts wrote them.
        lines: Each with its line break, none longer than a chunk.
        max_bytes: What is kept of the log, to the precision of a chunk.
    """
    log = LogRepository(session, job_id)
    end = log.end()
    chunks = []
    for text in _cut(lines):
        end += len(text.encode())
        chunks.append(JobLog(job_id=job_id, end_byte=end, attempt=attempt, text=text))
    log.add(chunks)
    if end > max_bytes:
        log.forget(end - max_bytes)


def read_log(
    session: Session,
    principal: Principal,
    job_id: str,
    *,
    after: int | None = None,
    attempt: int | None = None,
    limit: int = 200,
) -> LogPage:
    """Return lines of a job's log, oldest first: the last ones, or the first behind a place.

    Args:
        session: Where.
        principal: The owner.
        job_id: The job.
        after: The id of a line; 0 is the beginning.
        attempt: Only lines of this attempt.
        limit: At most so many lines.

    Raises:
        NotFound: Code `unknown_job`.
    """
    # Read before the lines: what a job has written is stored before its end is.
    job = JobRepository(session, principal).get(job_id)
    log = LogRepository(session, job_id)
    oldest = log.oldest()
    if after is None:
        lines, more = _last(log, attempt, limit), False
    else:
        lines, more = _next(log, min(after, _LAST_BYTE), attempt, limit)
    return LogPage(
        data=lines,
        next_cursor=str(lines[-1].id) if more else None,
        dropped_bytes=_begin(oldest) if oldest else 0,
        complete=not more and job.status in TERMINAL,
    )


def _last(log: LogRepository, attempt: int | None, limit: int) -> list[LogLine]:
    newest_first: list[LogLine] = []
    before: int | None = None
    while len(newest_first) < limit:
        chunks = log.list_before(before, attempt=attempt, limit=_CHUNKS_PER_LOOK)
        for chunk in chunks:
            newest_first += reversed(list(_lines(chunk)))
        if len(chunks) < _CHUNKS_PER_LOOK:
            break
        before = chunks[-1].end_byte
    return newest_first[:limit][::-1]


def _next(
    log: LogRepository, after: int, attempt: int | None, limit: int
) -> tuple[list[LogLine], bool]:
    found: list[LogLine] = []
    behind = after
    while len(found) <= limit:
        chunks = log.list_after(behind, attempt=attempt, limit=_CHUNKS_PER_LOOK)
        for chunk in chunks:
            found += (line for line in _lines(chunk) if line.id > after)
        if len(chunks) < _CHUNKS_PER_LOOK:
            break
        behind = chunks[-1].end_byte
    return found[:limit], len(found) > limit


def _lines(chunk: JobLog) -> Iterator[LogLine]:
    end = _begin(chunk)
    for text in chunk.text.split("\n")[:-1]:
        end += len(text.encode()) + 1
        yield LogLine(id=end, attempt=chunk.attempt, created_at=chunk.created_at, text=text)


def _begin(chunk: JobLog) -> int:
    return chunk.end_byte - len(chunk.text.encode())


def _cut(lines: str) -> Iterator[str]:
    """Yield pieces of a text that end with a line each and are no longer than a chunk."""
    piece: list[str] = []
    size = 0
    for line in lines.split("\n")[:-1]:
        length = len(line.encode()) + 1
        if piece and size + length > _CHUNK_BYTES:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line + "\n")
        size += length
    if piece:
        yield "".join(piece)

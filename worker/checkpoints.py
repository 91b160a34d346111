"""Checkpoints between the trainer's directory and the artifact store.

Owns the archive (an uncompressed tar), its way up beside the running training, and its way down
again into the next attempt, which trusts nothing that does not hash to what was written.
"""

from __future__ import annotations

import queue
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from core import failpoints, jobs
from core.artifacts import sha256_file
from core.errors import LeaseLost, TunesmithError
from core.logging import bind, get_logger
from core.storage import ArtifactStore
from worker.lease import Lease

_CHUNK_BYTES = 1024**2
# A checkpoint is bounded by what the trainer's disk held; this only stops a runaway.
_MAX_BYTES = 2**40

log = get_logger(__name__)


class CheckpointUploader:
    """Stores the checkpoints of one attempt in a thread of its own, oldest first.

    A checkpoint that cannot be stored costs the job nothing but the way back to it, so that is
    reported as an event and training goes on.

    Args:
        lease: The attempt.
        store: Where archives go.
        give_up: Set when the worker may wait no longer for the database.
    """

    def __init__(self, lease: Lease, store: ArtifactStore, give_up: threading.Event) -> None:
        self._lease = lease
        self._store = store
        self._give_up = give_up
        self._waiting: queue.SimpleQueue[tuple[int, Path] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def add(self, step: int, directory: Path) -> None:
        """Store a checkpoint's directory soon, and remove the directory afterwards."""
        self._waiting.put((step, directory))

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until everything added is stored or given up.

        Args:
            timeout_seconds: Wait no longer than this; what is not stored by then is not registered.
        """
        self._waiting.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            log.warning("checkpoint_abandoned", timeout_seconds=timeout_seconds)

    def _work(self) -> None:
        claim = self._lease.claim
        with bind(job_id=claim.job_id, attempt=claim.attempt):
            while (item := self._waiting.get()) is not None:
                step, directory = item
                try:
                    self._store_one(step, directory)
                except LeaseLost:
                    log.warning("checkpoint_of_lost_lease", step=step)
                except Exception as error:
                    log.exception("checkpoint_not_stored", step=step)
                    self._lease.add(
                        jobs.EventUpdate("checkpoint_failed", {"step": step, "reason": repr(error)})
                    )
                finally:
                    shutil.rmtree(directory, ignore_errors=True)

    def _store_one(self, step: int, directory: Path) -> None:
        blob = self._store.write_blob(self._chunks(directory), _MAX_BYTES)
        self._lease.write(
            jobs.add_checkpoint, self._give_up, step=step, blob=blob, store=self._store
        )

    def _chunks(self, directory: Path) -> Iterator[bytes]:
        claim = self._lease.claim
        for number, chunk in enumerate(archive(directory)):
            if number == 1:
                failpoints.reached("checkpoint.upload", job_id=claim.job_id, attempt=claim.attempt)
            yield chunk


def restore_newest(
    claim: jobs.Claim,
    store: ArtifactStore,
    directory: Path,
    reject: Callable[[jobs.CheckpointRef, str], None],
) -> jobs.CheckpointRef | None:
    """Unpack the newest checkpoint that is whole; `None` when there is none.

    Args:
        claim: Names the checkpoints.
        store: Holds them.
        directory: Made here.
        reject: Hears of each that is damaged or gone, and why.
    """
    for checkpoint in claim.checkpoints:
        try:
            path = store.blob_path(checkpoint.sha256)
        except TunesmithError as error:
            if error.retryable:
                raise
            reject(checkpoint, error.message)
            continue
        size = path.stat().st_size
        if size != checkpoint.bytes:
            reject(checkpoint, f"it has {size} bytes instead of {checkpoint.bytes}")
        elif sha256_file(path) != checkpoint.sha256:
            reject(checkpoint, "its bytes are not those that were written")
        else:
            with tarfile.open(path, "r:") as packed:
                packed.extractall(directory, filter="data")
            return checkpoint
    return None


def archive(directory: Path) -> Iterator[bytes]:
    """Yield a tar archive of a directory's files, piece by piece."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        entry = tarfile.TarInfo(path.relative_to(directory).as_posix())
        entry.size = path.stat().st_size
        yield entry.tobuf()
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                yield chunk
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)

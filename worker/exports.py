"""Makes exports beside the light worker's other work, one at a time, in a child that ends with it.

Owns an attempt from its claim to its file in the store. The child holds a whole base model, so it
is started for an export and not kept.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from core import base_models, exports
from core.config import Settings
from core.db.session import Database
from core.errors import LeaseLost, TunesmithError, from_wire
from core.exports import ExportClaim
from core.logging import bind, get_logger
from core.storage import ArtifactStore
from worker.child import ChildProcess, Failed, Finished, Outcome, Stopped

EXPORTER_ARGV = (sys.executable, "-m", "core.training.export_process")

_NICENESS = 10
_RENEWALS_A_LEASE = 4
_CHUNK_BYTES = 1024**2
_NO_LIMIT_BYTES = 2**62

log = get_logger(__name__)


class Exporter:
    """Makes the exports that wait.

    Args:
        settings: Lease, attempts, the converter, the data directory.
        database: Where the exports are.
        store: Holds the adapters and takes the files.
        worker_id: Of this process.
        stopping: Set when the process shall end.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ArtifactStore,
        worker_id: str,
        stopping: threading.Event,
    ) -> None:
        self._settings = settings
        self._database = database
        self._store = store
        self._worker_id = worker_id
        self._stopping = stopping
        self._root = settings.root / "exports"

    def work(self) -> None:
        """Make exports until none waits or the process shall end."""
        while not self._stopping.is_set():
            # Mostly nothing waits, and then it does not matter which base models are here.
            if not exports.is_due(self._database):
                return
            with self._database.session() as session:
                absent = base_models.list_absent(session)
            if not exports.is_due(self._database, absent):
                return
            self._remove_stale_work()
            claim = exports.claim(
                self._database,
                self._worker_id,
                lease_seconds=self._settings.lease_seconds,
                max_attempts=self._settings.max_attempts,
                absent=absent,
            )
            if claim is None:
                return
            with bind(export_id=claim.export_id, attempt=claim.attempt):
                log.info("export_claimed", format=claim.format, dtype=claim.dtype)
                try:
                    self._make(claim)
                except LeaseLost:
                    log.warning("export_left_to_another_attempt")

    def _make(self, claim: ExportClaim) -> None:
        work_dir = self._root / f"{claim.export_id}-{claim.attempt}"
        work_dir.mkdir(parents=True, exist_ok=True)
        keeper = _Keeper(self._database, claim, self._worker_id, self._settings.lease_seconds)
        try:
            with keeper:
                try:
                    outcome = self._run_child(claim, work_dir, keeper)
                    self._conclude(claim, outcome, keeper)
                except (LeaseLost, SQLAlchemyError):
                    raise
                except TunesmithError as error:
                    if error.retryable:
                        # After the lease the next attempt comes, here or elsewhere.
                        log.warning("export_waits", code=error.code, error=error.message)
                        return
                    exports.fail(self._database, claim, self._worker_id, error.as_dict())
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)

    def _run_child(self, claim: ExportClaim, work_dir: Path, keeper: _Keeper) -> Outcome:
        child = ChildProcess(
            EXPORTER_ARGV,
            log_path=self._settings.root / "logs" / "exporter.log",
            environment={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            niceness=_NICENESS,
        )
        task = {
            "base_path": claim.base_path,
            "adapter_path": str(self._store.adapter_path(claim.digest)),
            "format": claim.format,
            "dtype": claim.dtype,
            "converter": self._settings.gguf_converter,
            "work_dir": str(work_dir),
        }

        def stop_reason() -> str | None:
            return "lost" if keeper.lost else "shutdown" if self._stopping.is_set() else None

        try:
            # What it does cannot be cut short in the middle, and nothing of it is worth keeping.
            return child.run(
                task, on_event=lambda _: None, stop_reason=stop_reason, grace_seconds=1.0
            )
        finally:
            child.close()

    def _conclude(self, claim: ExportClaim, outcome: Outcome, keeper: _Keeper) -> None:
        if keeper.lost:
            raise LeaseLost("another attempt owns the export, or it was deleted")
        match outcome:
            case Finished(result):
                blob = self._store.write_blob(_chunks(Path(result["path"])), _NO_LIMIT_BYTES)
                exports.succeed(
                    self._database, claim, self._worker_id, blob, self._store, self._settings
                )
                log.info("export_succeeded", bytes=blob.bytes, sha256=blob.sha256)
            case Failed(error):
                exports.fail(self._database, claim, self._worker_id, from_wire(error).as_dict())
                log.warning("export_failed", **_shown(error))
            case Stopped():
                exports.hand_back(self._database, claim, self._worker_id, counted=False)
            case _:
                log.warning("export_attempt_lost", reason=outcome.reason)
                exports.hand_back(self._database, claim, self._worker_id, counted=True)

    def _remove_stale_work(self) -> None:
        # Listed before asking: what is created later is not in the list.
        found = [path.name for path in self._root.iterdir()] if self._root.is_dir() else []
        live = {f"{name}-{attempt}" for name, attempt in exports.held_attempts(self._database)}
        for name in set(found) - live:
            shutil.rmtree(self._root / name, ignore_errors=True)


class _Keeper:
    """Renews the lease while its block runs."""

    def __init__(
        self, database: Database, claim: ExportClaim, worker_id: str, lease_seconds: float
    ) -> None:
        self.lost = False
        self._database = database
        self._claim = claim
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="export-lease", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        until = time.monotonic() + self._lease_seconds
        while not self._over.wait(self._lease_seconds / _RENEWALS_A_LEASE):
            try:
                exports.renew(self._database, self._claim, self._worker_id, self._lease_seconds)
                until = time.monotonic() + self._lease_seconds
            except LeaseLost:
                # It has ended meanwhile, or somebody else has it.
                self.lost = not self._over.is_set()
                return
            except SQLAlchemyError as error:
                log.warning("export_lease_not_renewed", error=type(error).__name__)
                if time.monotonic() > until:
                    self.lost = True
                    return


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream, contextlib.closing(stream):
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _shown(error: dict[str, Any]) -> dict[str, Any]:
    return {name: error.get(name) for name in ("code", "message")}

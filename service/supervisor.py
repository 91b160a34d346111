"""The supervisor: runs all parts of the service on one machine and stops them cleanly.

Owns their processes: starts them by argv, restarts what crashes, stops them in order, and leaves
none behind, not even when it is killed itself. Knows nothing of what the parts do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.config import Settings
from core.errors import Conflict
from core.lifeline import LIFELINE_VARIABLE
from core.logging import get_logger

_FIRST_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 30.0
_HEALTHY_SECONDS = 60.0
_READY_POLL_SECONDS = 0.2
# A part needs a moment of its own after its grace period has ended its children.
_KILL_MARGIN_SECONDS = 5.0

log = get_logger(__name__)


@dataclass(frozen=True)
class ProcessSpec:
    """A part of the service.

    Attributes:
        name: For the log.
        argv: The program.
        env: All of its environment variables; `None` inherits ours.
        ready: Tells whether the part does its work; asked until it says yes, from a thread.
        stop_stage: Parts of a lower stage are stopped, and gone, before those of a higher one.
    """

    name: str
    argv: Sequence[str]
    env: dict[str, str] | None = None
    ready: Callable[[], bool] | None = None
    stop_stage: int = 0


def service_processes(
    settings: Settings, *, host: str, port: int, api_workers: int = 1
) -> list[ProcessSpec]:
    """Return the parts of a complete service; workers stop first, then API, then engine.

    There is no engine among them where others are configured: nobody would ask it.
    """

    def part(name: str, stage: int, *arguments: str) -> ProcessSpec:
        argv = [sys.executable, "-m", "service.cli", *arguments]
        return ProcessSpec(name, argv, {**os.environ, **settings.environment()}, None, stage)

    api = ("api", "--host", host, "--port", str(port), "--workers", str(api_workers))
    return [
        *([part("engine", 2, "engine")] if settings.uses_local_engine else []),
        part("api", 1, *api),
        part("light-worker", 0, "worker", "--queue", "light"),
        part("train-worker", 0, "worker", "--queue", "train"),
    ]


class Supervisor:
    """Runs processes until it is told to stop; to be used in the main thread.

    SIGINT or SIGTERM stops all parts; a second one kills them at once.

    Args:
        processes: The parts, in starting order.
        lock_path: Only one supervisor at a time holds this file.
        grace_seconds: What the parts may take to stop; SIGKILL follows 5 s later.
        on_ready: Called once, from a thread, when every part with a `ready` check has passed it.
    """

    def __init__(
        self,
        processes: Sequence[ProcessSpec],
        *,
        lock_path: Path,
        grace_seconds: float,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._parts = [_Part(spec) for spec in processes]
        self._lock_path = lock_path
        self._grace_seconds = grace_seconds
        self._on_ready = on_ready
        self._interrupts = 0

    def run(self) -> int:
        """Run until stopped; return the exit code: 0, or 130 when stopping was cut short.

        Raises:
            Conflict: Code `already_running`; another supervisor holds the lock.
        """
        with locked(self._lock_path), self._signals() as wake_up:
            threading.Thread(target=self._watch_readiness, name="readiness", daemon=True).start()
            try:
                while not self._interrupts:
                    self._start_and_reap()
                    _wait(wake_up, self._seconds_to_next_start())
                return self._stop(wake_up)
            finally:
                self._kill(self._parts)

    def _start_and_reap(self) -> None:
        for part in self._parts:
            part.reap()
            if part.process is None and time.monotonic() >= part.start_at and not self._interrupts:
                part.start()

    def _seconds_to_next_start(self) -> float | None:
        waiting = [part.start_at for part in self._parts if part.process is None]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _stop(self, wake_up: int) -> int:
        log.info("stopping")
        for stage in sorted({part.spec.stop_stage for part in self._parts}):
            parts = [part for part in self._parts if part.spec.stop_stage == stage]
            deadline = time.monotonic() + self._grace_seconds + _KILL_MARGIN_SECONDS
            for part in parts:
                part.signal(signal.SIGTERM)
            while any(part.is_running() for part in parts) and self._interrupts < 2:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                _wait(wake_up, remaining)
            stubborn = [part for part in parts if part.is_running()]
            if stubborn and self._interrupts < 2:
                log.warning("killing", parts=[part.spec.name for part in stubborn])
            self._kill(parts)
        log.info("stopped")
        return 0 if self._interrupts < 2 else 130

    def _kill(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            part.signal(signal.SIGKILL)
        for part in parts:
            if part.process is not None:
                part.process.wait()
                part.forget()

    def _watch_readiness(self) -> None:
        for part in self._parts:
            while not part.is_ready():
                time.sleep(_READY_POLL_SECONDS)
        if self._on_ready is not None:
            self._on_ready()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[int]:
        """Count interrupts; yield a descriptor that becomes readable with every signal."""

        def interrupt(_: int, __: object) -> None:
            self._interrupts += 1

        def child_changed(_: int, __: object) -> None:
            """Let Python notice the signal, so that it writes to the pipe."""

        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        handlers = {
            signal.SIGINT: interrupt,
            signal.SIGTERM: interrupt,
            signal.SIGHUP: interrupt,
            signal.SIGCHLD: child_changed,
        }
        previous = {number: signal.signal(number, handlers[number]) for number in handlers}
        try:
            yield reading
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            os.close(reading)
            os.close(writing)


@dataclass
class _Part:
    """A part and its present process."""

    spec: ProcessSpec
    process: subprocess.Popen[bytes] | None = None
    start_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    crashes: int = 0

    def start(self) -> None:
        self.started_at = time.monotonic()
        env = dict(os.environ if self.spec.env is None else self.spec.env)
        try:
            self.process = subprocess.Popen(
                list(self.spec.argv),
                # Nothing is ever written: the part ends when the kernel closes the pipe with us.
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                env={**env, LIFELINE_VARIABLE: "stdin"},
                # Not a session: Linux may divide the processors between those, see sched(7), and an
                # API that seldom computes would wait long for its turn beside an engine.
                process_group=0,
            )
        except OSError as error:
            delay = self._plan_restart()
            log.error("part_not_started", part=self.spec.name, error=str(error), retry_in=delay)
            return
        log.info("part_started", part=self.spec.name, part_pid=self.process.pid)

    def reap(self) -> None:
        """Notice that the process ended, and plan its next start."""
        if self.process is None or self.process.poll() is None:
            return
        code = self.process.returncode
        log.error("part_ended", part=self.spec.name, exit_code=code, retry_in=self._plan_restart())
        # What it may have left behind would be in the way of its successor.
        self.signal(signal.SIGKILL)
        self.forget()

    def _plan_restart(self) -> float:
        now = time.monotonic()
        if now - self.started_at >= _HEALTHY_SECONDS:
            self.crashes = 0
        # The exponent is bounded: a part may crash for days.
        delay = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(self.crashes, 10), _MAX_BACKOFF_SECONDS)
        self.crashes += 1
        self.start_at = now + delay
        return delay

    def is_ready(self) -> bool:
        try:
            return self.spec.ready is None or self.spec.ready()
        except Exception as error:
            log.warning("readiness_check_failed", part=self.spec.name, error=repr(error))
            return False

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Signal the process; SIGKILL goes to the processes that it started, too."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def forget(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock, with our process id in it; the kernel frees it when we end.

    Raises:
        Conflict: Code `already_running`; the message names the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise Conflict(
                f"Tunesmith already runs in {path.parent.parent} (process {holder})",
                code="already_running",
                hint="Stop that process, or choose another --data-dir.",
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _wait(wake_up: int, timeout_seconds: float | None) -> None:
    select.select([wake_up], [], [], timeout_seconds)
    with contextlib.suppress(BlockingIOError):
        os.read(wake_up, 4096)

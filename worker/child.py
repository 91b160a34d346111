"""The parent's side of a child process that does the heavy work: start, feed, stop, replace.

Owns the life of one long-lived child: it is started for the first task, kept warm for the next,
asked to stop, killed when it does not, and replaced when it has grown too large. Knows frames (see
`core.child`), but neither jobs nor the database.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from core.child import (
    EVENTS_FD_VARIABLE,
    LIFELINE_FD_VARIABLE,
    NICENESS_VARIABLE,
    FrameDecoder,
    encode_frame,
)
from core.lifeline import LIFELINE_VARIABLE
from core.logging import get_logger
from worker.memory_kills import count_memory_kills

_POLL_SECONDS = 0.1
_SEND_TIMEOUT_SECONDS = 10.0
_MAX_LOG_BYTES = 10 * 1024**2

log = get_logger(__name__)


@dataclass(frozen=True)
class Finished:
    """The task is done."""

    result: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The task failed in a way the child could report; `error` as `core.errors.to_wire`."""

    error: dict[str, Any]


@dataclass(frozen=True)
class Stopped:
    """The task ended on request; `forced` when the child had to be killed for it."""

    forced: bool


@dataclass(frozen=True)
class Crashed:
    """The child ended, or stopped making sense, in the middle of the task.

    `out_of_memory` when the kernel killed a process for memory in that time.
    """

    reason: str
    out_of_memory: bool = False


Outcome = Finished | Failed | Stopped | Crashed

# After these the child's memory is in doubt.
_CODES_THAT_TAINT = {"out_of_memory", "internal_error"}


class ChildProcess:
    """A child program that speaks frames.

    Args:
        argv: The program, which calls `core.child.serve`.
        log_path: Where its stdout and stderr are appended to.
        environment: Variables besides those of this process.
        niceness: Added to the child's priority value.
        max_rss_bytes: The child is replaced after a task that left it larger; 0 is half of the
            machine's memory.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log_path: Path,
        environment: dict[str, str] | None = None,
        niceness: int = 0,
        max_rss_bytes: int = 0,
    ) -> None:
        self._argv = list(argv)
        self._log_path = log_path
        self._environment = environment or {}
        self._niceness = niceness
        self._max_rss_bytes = max_rss_bytes or psutil.virtual_memory().total // 2
        self._live: _Live | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        return self._live.process.pid if self._live else None

    def ensure_running(self) -> None:
        """Start the child unless it runs."""
        if self._live and self._live.has_ended_idle():
            log.warning("idle_child_ended", reason=self._live.wait_for_ending())
            self.close()
        if self._live is None:
            self._live = self._start()
            log.info("child_started", child_pid=self._live.process.pid, argv=self._argv)

    def run(
        self,
        task: dict[str, Any],
        *,
        on_event: Callable[[dict[str, Any]], None],
        stop_reason: Callable[[], str | None],
        grace_seconds: float,
    ) -> Outcome:
        """Run one task to its end.

        Args:
            task: What the child's handler gets.
            on_event: Called with every event that is not an ending.
            stop_reason: Asked several times a second; anything but `None` is passed to the child.
            grace_seconds: From a stop request to SIGKILL.
        """
        was_warm = self._live is not None
        try:
            self.ensure_running()
            assert self._live is not None
            self._live.heard = 0
            outcome = self._converse(self._live, task, on_event, stop_reason, grace_seconds)
            heard = self._live.heard
        except BaseException:
            self.close()
            raise
        if self._must_be_replaced(outcome):
            self.close()
        if isinstance(outcome, Crashed) and was_warm and not heard:
            # It was dying before it got the task, which therefore deserves a child of its own.
            log.warning("idle_child_ended", reason=outcome.reason)
            return self.run(
                task, on_event=on_event, stop_reason=stop_reason, grace_seconds=grace_seconds
            )
        return outcome

    def close(self) -> None:
        """End the child, with all processes that it started."""
        if self._live is None:
            return
        live, self._live = self._live, None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(live.process.pid, signal.SIGKILL)
        live.process.wait()
        live.close()

    def _start(self) -> _Live:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        if self._log_path.exists() and self._log_path.stat().st_size > _MAX_LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".1.log"))
        events, child_events = os.pipe()
        child_lifeline, lifeline = os.pipe()
        environment = {
            **os.environ,
            **self._environment,
            "PYTHONUNBUFFERED": "1",
            EVENTS_FD_VARIABLE: str(child_events),
            LIFELINE_FD_VARIABLE: str(child_lifeline),
            NICENESS_VARIABLE: str(self._niceness),
        }
        environment.pop(LIFELINE_VARIABLE, None)  # its stdin carries requests
        try:
            with self._log_path.open("ab") as output:
                process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(child_events, child_lifeline),
                    # A Ctrl-C at the terminal is for us; we tell the child what to do.
                    start_new_session=True,
                )
        except BaseException:
            os.close(events)
            os.close(lifeline)
            raise
        finally:
            os.close(child_events)
            os.close(child_lifeline)
        return _Live(process, events, lifeline)

    def _converse(
        self,
        live: _Live,
        task: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None],
        stop_reason: Callable[[], str | None],
        grace_seconds: float,
    ) -> Outcome:
        kill_at: float | None = None
        try:
            live.memory_kills = count_memory_kills()
            live.send({"op": "run", "task": task})
            while True:
                for frame in live.receive():
                    live.heard += 1
                    match frame.get("event"):
                        case "finished":
                            return Finished(frame["result"])
                        case "failed":
                            return Failed(frame["error"])
                        case "stopped":
                            return Stopped(forced=False)
                        case "ready":
                            continue
                        case _:
                            on_event(frame)
                if live.ended:
                    return live.crashed()
                reason = stop_reason()
                if reason is not None and kill_at is None:
                    kill_at = time.monotonic() + grace_seconds
                    live.send({"op": "stop", "reason": reason})
                elif kill_at is not None and time.monotonic() >= kill_at:
                    log.warning("child_killed", reason=reason, grace_seconds=grace_seconds)
                    return Stopped(forced=True)
        except BrokenPipeError:
            return live.crashed()
        except (TimeoutError, ValueError, KeyError, TypeError) as error:
            return Crashed(f"it broke the protocol: {error!r}")

    def _must_be_replaced(self, outcome: Outcome) -> bool:
        match outcome:
            case Crashed() | Stopped(forced=True):
                return True
            case Failed(error) if error.get("code") in _CODES_THAT_TAINT:
                return True
        try:
            size = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:
            return True
        if size > self._max_rss_bytes:
            log.info("child_recycled", rss_bytes=size, max_rss_bytes=self._max_rss_bytes)
            return True
        return False


@dataclass
class _Live:
    """A started child with the parent's ends of its pipes."""

    process: subprocess.Popen[bytes]
    events: int
    lifeline: int
    ended: bool = False
    heard: int = 0
    memory_kills: int = 0
    decoder: FrameDecoder = field(default_factory=FrameDecoder)

    def __post_init__(self) -> None:
        os.set_blocking(self.events, False)
        os.set_blocking(self._stdin, False)

    @property
    def _stdin(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def send(self, frame: dict[str, Any]) -> None:
        """Write a frame.

        Raises:
            BrokenPipeError: The child is gone.
            TimeoutError: It does not read.
        """
        view = memoryview(encode_frame(frame))
        deadline = time.monotonic() + _SEND_TIMEOUT_SECONDS
        while view:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([], [self._stdin], [], remaining)[1]:
                raise TimeoutError("the child takes no requests")
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._stdin, view[: select.PIPE_BUF]) :]

    def receive(self) -> list[dict[str, Any]]:
        """Wait a moment for frames; sets `ended` when there will be no more."""
        frames: list[dict[str, Any]] = []
        # A grandchild may keep the pipe open, so its end alone is not enough of a sign.
        exited = self.process.poll() is not None
        if not select.select([self.events], [], [], 0 if exited else _POLL_SECONDS)[0]:
            self.ended = exited
            return frames
        chunk = os.read(self.events, 1024 * 1024)
        if not chunk:
            self.ended = True
        frames.extend(self.decoder.feed(chunk))
        return frames

    def has_ended_idle(self) -> bool:
        """Tell whether the child ended between tasks; what it said meanwhile is dropped."""
        # The pipe closes a little before the process can be waited for.
        while not self.ended and select.select([self.events], [], [], 0)[0]:
            self.receive()
        return self.ended or self.process.poll() is not None

    def crashed(self) -> Crashed:
        """Return how the child ended in the middle of a task."""
        reason = self.wait_for_ending()
        killed = self.process.returncode == -signal.SIGKILL
        return Crashed(reason, out_of_memory=killed and count_memory_kills() > self.memory_kills)

    def wait_for_ending(self) -> str:
        """Return how the child ended; an unfinished ending is waited for briefly."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
        return _ending(self.process)

    def close(self) -> None:
        """Close our ends of the pipes."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        os.close(self.events)
        os.close(self.lifeline)


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None:
        return "it closed its event pipe"
    if code >= 0:
        return f"it exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "it was killed by SIGKILL, which the kernel also sends when memory runs out"
    return f"it was killed by {name}"

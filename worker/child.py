"""The parent's side of a child process that does the heavy work: start, feed, stop, replace.

Owns the life of one long-lived child: it is started for the first task, kept warm for the next,
asked to stop, killed when it does not, and replaced when it has grown too large. What it prints
comes by a pipe, so that it is known which task it belongs to. Knows frames (see `core.child`), but
neither jobs nor the database.
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
from worker.output_file import OutputFile

_POLL_SECONDS = 0.1
_SEND_TIMEOUT_SECONDS = 10.0
_READ_BYTES = 64 * 1024
# Of output that is read after the child's end; a pipe holds less.
_MAX_LAST_READS = 32

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
        log_path: Where its stdout and stderr are appended to; see `OutputFile`.
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
        self._output = OutputFile(log_path)
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
        on_output: Callable[[bytes], None] | None = None,
    ) -> Outcome:
        """Run one task to its end.

        Args:
            task: What the child's handler gets.
            on_event: Called with every event that is not an ending.
            stop_reason: Asked several times a second; anything but `None` is passed to the child.
            grace_seconds: From a stop request to SIGKILL.
            on_output: Called with what the child prints meanwhile, to the last byte if it dies.
        """
        was_warm = self._live is not None
        try:
            self.ensure_running()
            assert self._live is not None
            live = self._live
            live.heard, live.on_output = 0, on_output
            outcome = self._converse(live, task, on_event, stop_reason, grace_seconds)
            live.drain_output()
            if self._must_be_replaced(outcome):
                self.close()
            live.on_output = None
        except BaseException:
            self.close()
            raise
        if isinstance(outcome, Crashed) and was_warm and not live.heard:
            # It was dying before it got the task, which therefore deserves a child of its own.
            log.warning("idle_child_ended", reason=outcome.reason)
            return self.run(
                task,
                on_event=on_event,
                stop_reason=stop_reason,
                grace_seconds=grace_seconds,
                on_output=on_output,
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
        live.drain_output()
        live.close()
        self._output.close()

    def _start(self) -> _Live:
        events, child_events = os.pipe()
        output, child_output = os.pipe()
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
            process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=child_output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(child_events, child_lifeline),
                # A Ctrl-C at the terminal is for us; we tell the child what to do.
                start_new_session=True,
            )
        except BaseException:
            for ours in (events, output, lifeline):
                os.close(ours)
            raise
        finally:
            for childs in (child_events, child_output, child_lifeline):
                os.close(childs)
        return _Live(process, events, output, lifeline, self._output)

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
    output: int
    lifeline: int
    log_file: OutputFile
    on_output: Callable[[bytes], None] | None = None
    ended: bool = False
    heard: int = 0
    memory_kills: int = 0
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    _silent: bool = False

    def __post_init__(self) -> None:
        os.set_blocking(self.events, False)
        os.set_blocking(self.output, False)
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
            printed = [] if self._silent else [self.output]
            readable, writable, _ = select.select(printed, [self._stdin], [], max(0, remaining))
            if readable:
                # A child that cannot print does not read either.
                self._read_output()
            if not writable and remaining <= 0:
                raise TimeoutError("the child takes no requests")
            if writable:
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self._stdin, view[: select.PIPE_BUF]) :]

    def receive(self) -> list[dict[str, Any]]:
        """Wait a moment for frames; sets `ended` when there will be no more."""
        frames: list[dict[str, Any]] = []
        # A grandchild may keep the pipe open, so its end alone is not enough of a sign.
        exited = self.process.poll() is not None
        watched = [self.events] if self._silent else [self.events, self.output]
        readable = select.select(watched, [], [], 0 if exited else _POLL_SECONDS)[0]
        if self.output in readable:
            self._read_output()
        if self.events not in readable:
            self.ended = exited
            return frames
        chunk = os.read(self.events, 1024 * 1024)
        if not chunk:
            self.ended = True
        frames.extend(self.decoder.feed(chunk))
        return frames

    def drain_output(self) -> None:
        """Read what the child has printed until now."""
        for _ in range(_MAX_LAST_READS):
            if self._silent or not self._read_output():
                return

    def _read_output(self) -> bool:
        """Pass on some output; tell whether there was any."""
        try:
            data = os.read(self.output, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._silent = True
            return False
        self.log_file.write(data)
        if self.on_output is not None:
            self.on_output(data)
        return True

    def has_ended_idle(self) -> bool:
        """Tell whether the child ended between tasks; what it said meanwhile is dropped."""
        self.drain_output()
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
        for descriptor in (self.events, self.output, self.lifeline):
            os.close(descriptor)


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

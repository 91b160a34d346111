"""The frame protocol between a worker and its child process, and the child's side of it.

Owns how a child program speaks: JSON lines, requests on stdin, events on a pipe of their own, so
that whatever a library prints cannot be mistaken for an event. A child never outlives its parent.
Knows no torch, no database and no queue; what a task means is the handler's business.

    parent → child   {"op": "run", "task": {…}}      {"op": "stop", "reason": "cancel"}
    child → parent   {"event": "ready"}              once, when the child can take a task
                     {"event": "progress", …}        any events of the handler
                     {"event": "finished", "result": {…}}
                     {"event": "failed", "error": {…}}     as `core.errors.to_wire`
                     {"event": "stopped"}            a stop request was honoured
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.errors import TrainingFailed, TunesmithError, Unavailable, to_wire
from core.memory_limits import is_out_of_memory

EVENTS_FD_VARIABLE = "TUNESMITH_CHILD_FD"
LIFELINE_FD_VARIABLE = "TUNESMITH_CHILD_LIFELINE_FD"
NICENESS_VARIABLE = "TUNESMITH_CHILD_NICENESS"

MAX_FRAME_BYTES = 16 * 1024**2

# The scheduling group of a session; see sched(7).
_AUTOGROUP = Path("/proc/self/autogroup")


class Stopped(Exception):
    """Raised by a handler that ends early because `Channel.should_stop` told it to."""


def encode_frame(frame: dict[str, Any]) -> bytes:
    """Return one frame as a line of JSON."""
    # Plain ASCII: no character of the payload can be taken for a line break.
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"


class FrameDecoder:
    """Cuts a byte stream into frames.

    Raises:
        ValueError: From `feed`, when a line is no frame or longer than `MAX_FRAME_BYTES`.
    """

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yield the frames that `chunk` completes."""
        self._pending += chunk
        *lines, rest = self._pending.split(b"\n")
        self._pending = rest
        for line in lines:
            frame = json.loads(line)
            if not isinstance(frame, dict):
                raise ValueError("a frame is not an object")
            yield frame
        if len(rest) > MAX_FRAME_BYTES:
            raise ValueError("a frame is too long")


class Channel:
    """What a handler has of its parent: a way to send events and to hear a stop request.

    Args:
        events_fd: File descriptor that events are written to.
    """

    def __init__(self, events_fd: int) -> None:
        self._events_fd = events_fd
        self._writing = threading.Lock()
        self._stop_reason: str | None = None

    @property
    def stop_reason(self) -> str | None:
        """Why the task shall stop, such as `cancel` or `pause`; `None` while it shall go on."""
        return self._stop_reason

    def should_stop(self) -> bool:
        """Tell whether the task shall end at its next step boundary."""
        return self._stop_reason is not None

    def check_stop(self) -> None:
        """Raise `Stopped` when the task shall end, for whatever reason."""
        if self.should_stop():
            raise Stopped

    def send(self, event: str, **fields: Any) -> None:
        """Send one event to the parent; safe from any thread."""
        view = memoryview(encode_frame({"event": event, **fields}))
        with self._writing:
            while view:
                view = view[os.write(self._events_fd, view) :]


Handler = Callable[[dict[str, Any], Channel], dict[str, Any] | None]


def serve(handler: Handler) -> None:
    """Run tasks one after another until the parent goes away; does not return.

    The handler runs in the calling thread. It returns the result, raises `Stopped` (or returns
    `None`) after a stop request, or raises an error, which is reported under its code.

    Args:
        handler: Takes the task and the channel.
    """
    events_fd = int(os.environ.pop(EVENTS_FD_VARIABLE))
    # Programs that the handler starts must not hold the pipe open after this process has died.
    os.set_inheritable(events_fd, False)
    _give_way(int(os.environ.pop(NICENESS_VARIABLE, "0")))
    _die_with_parent(int(os.environ.pop(LIFELINE_FD_VARIABLE, "-1")))

    channel = Channel(events_fd)
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(
        target=_read_requests, args=(channel, tasks), name="requests", daemon=True
    ).start()
    channel.send("ready")
    while True:
        _run_task(handler, tasks.get(), channel)


def _run_task(handler: Handler, task: dict[str, Any], channel: Channel) -> None:
    try:
        result = handler(task, channel)
    except Stopped:
        channel.send("stopped")
    except TunesmithError as error:
        channel.send("failed", error=to_wire(error))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        channel.send("failed", error=to_wire(_describe(error)))
    else:
        if result is None:
            channel.send("stopped")
        else:
            channel.send("finished", result=result)


def _read_requests(channel: Channel, tasks: queue.SimpleQueue[dict[str, Any]]) -> None:
    decoder = FrameDecoder()
    try:
        while chunk := os.read(0, 65_536):
            for frame in decoder.feed(chunk):
                if frame["op"] == "run":
                    # Here, in reading order: a late stop meant for the last task ends with it.
                    channel._stop_reason = None
                    tasks.put(frame["task"])
                elif frame["op"] == "stop":
                    channel._stop_reason = str(frame.get("reason", "cancel"))
    finally:
        # The parent is gone or talks nonsense; nobody is left to work for.
        os._exit(1)


def _give_way(niceness: int) -> None:
    """Let other processes go first, by as much as `nice` says."""
    value = os.nice(niceness)
    # Where Linux divides the processors between sessions first, a process' own value counts only
    # within its session, and this one, which has it for itself, would take a full share of them.
    with contextlib.suppress(OSError):
        _AUTOGROUP.write_text(str(value))


def _die_with_parent(lifeline_fd: int) -> None:
    """Have the kernel kill this process when the other end of the lifeline closes.

    The reader thread sees the parent's death too, but it needs the interpreter lock, which a long
    C call may hold. Elsewhere than on Linux the thread is all there is.
    """
    if lifeline_fd < 0 or not hasattr(fcntl, "F_SETSIG"):
        return
    os.set_inheritable(lifeline_fd, False)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([lifeline_fd], [], [], 0)[0]:
        os._exit(1)  # it closed before the kernel was asked to watch


def _describe(error: Exception) -> TunesmithError:
    message = traceback.format_exception_only(error)[-1].strip()
    if is_out_of_memory(error):
        return TrainingFailed(
            message,
            code="out_of_memory",
            hint="Lower training.batch_size or training.max_length, or use a smaller base model.",
        )
    if _is_disk_full(error):
        return Unavailable(
            message, code="storage_full", hint="Make room on the worker's data directory."
        )
    return TunesmithError(
        message,
        code="internal_error",
        hint="The log of the job, or of the worker, has the traceback.",
    )


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    # Writers in other languages give their own kinds of errors, but the system's words.
    return "No space left on device" in str(error)

"""What the child of an attempt writes, on its way into the job's log.

Owns the way from bytes to lines that can be shown to the job's owner: cut, cleaned, without
secrets, and no more at a time than the database should take. Knows no database.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable

# A longer line is cut. Secrets are looked for first, in as much of it as is held.
_MAX_LINE_CHARACTERS = 8 * 1024
_MAX_HELD_BYTES = 64 * 1024
_MAX_WAITING_BYTES = 256 * 1024
_CUT = " … (cut)"

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class JobOutput:
    """Collects lines until they are taken; the oldest are dropped when they are too many.

    Safe for one thread that feeds and another that takes. Feeding costs next to nothing, so that
    a child that writes without end is not held up by what becomes of it.

    Args:
        redact: Replaces the secrets of a line.
    """

    def __init__(self, redact: Callable[[str], str]) -> None:
        self._redact = redact
        # The beginning of a line whose end has not come yet, and whether more of it was left out.
        self._begun = bytearray()
        self._overlong = False
        self._lines: deque[tuple[bytes, bool]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._returned = ""
        self._taking = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Take what the child wrote."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._extend(part)
            self._end_line()
        self._extend(rest)

    def finish(self) -> None:
        """Take an unfinished line for a whole one: its writer has ended."""
        if self._begun:
            self._end_line()

    def take(self) -> str:
        """Return the lines that wait, each with its line break, and forget them."""
        with self._taking:
            waiting, self._lines = self._lines, deque()
            dropped, self._dropped, self._bytes = self._dropped, 0, 0
            returned, self._returned = self._returned, ""
        lines = [f"… {dropped} lines dropped, which came too fast"] if dropped else []
        lines += filter(None, (self._clean(*line) for line in waiting))
        return returned + "".join(line + "\n" for line in lines)

    def give_back(self, text: str) -> None:
        """Let lines wait again that could not be stored."""
        if len(text) > _MAX_WAITING_BYTES:
            text = text[-_MAX_WAITING_BYTES:].partition("\n")[2]
        with self._taking:
            self._returned = text

    def _extend(self, part: bytes) -> None:
        room = _MAX_HELD_BYTES - len(self._begun)
        self._begun += part[:room]
        self._overlong = self._overlong or len(part) > room

    def _end_line(self) -> None:
        line, overlong = bytes(self._begun), self._overlong
        self._begun, self._overlong = bytearray(), False
        with self._taking:
            self._lines.append((line, overlong))
            self._bytes += len(line) + 1
            while self._bytes > _MAX_WAITING_BYTES:
                self._bytes -= len(self._lines.popleft()[0]) + 1
                self._dropped += 1

    def _clean(self, line: bytes, overlong: bool) -> str:
        # A progress bar draws over itself; what is seen of it in the end is its last state.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        text = self._redact(_CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text))).rstrip()
        if overlong or len(text) > _MAX_LINE_CHARACTERS:
            text = text[:_MAX_LINE_CHARACTERS] + _CUT
        return text

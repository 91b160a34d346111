"""Ending a text before a stop string, without ever having shown a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, holding back what may still become a stop string.

    How the text was cut into pieces does not matter: the stop string that is complete first wins,
    and of several that are complete at once the longest.

    Args:
        stops: The strings; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what may be shown, and whether a stop string was met.

        After a stop string the rest is dropped and nothing may be pushed any more.
        """
        pending = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := pending.find(stop)) >= 0
        ]
        if found:
            _, start = min(found)
            self._held = ""
            return pending[:start], True
        keep = self._possible_start(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def flush(self) -> str:
        """Return what was held back, at the end of a text that met no stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

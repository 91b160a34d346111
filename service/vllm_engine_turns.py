"""Who is next at a server that does not know our projects: admission and turns.

A vLLM server computes what comes in the order of arrival and refuses nothing. So each API process
sends it a bounded number of rows, and keeps the rest here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from core.errors import Unavailable


@dataclass(eq=False)
class _Waiter:
    project_id: str
    rows: int
    turn: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Turns:
    """Hands out rows: next is the project that has the fewest, and of its requests the oldest.

    Nobody overtakes the next one, so that a request for many rows gets them.

    Args:
        max_rows: Rows that may be in use.
        max_waiting: Requests that may wait; further ones are refused.
    """

    def __init__(self, max_rows: int, max_waiting: int) -> None:
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._rows: Counter[str] = Counter()
        self._waiting: list[_Waiter] = []
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def take(self, project_id: str, rows: int) -> None:
        """Wait for rows; a request for more than there are gets all.

        Raises:
            Unavailable: Code `engine_full`.
        """
        waiter = _Waiter(project_id, min(rows, self._max_rows))
        self._waiting.append(waiter)
        self._hand_out()
        if not waiter.turn.done() and len(self._waiting) > self._max_waiting:
            self._waiting.remove(waiter)
            raise Unavailable(
                f"{self._max_waiting} requests wait for the engine already",
                code="engine_full",
                retry_after_seconds=2,
                hint="Send the request again a little later.",
            )
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self.give(project_id, rows)
            self._hand_out()
            raise

    def give(self, project_id: str, rows: int) -> None:
        """Give back what `take` took."""
        self._rows[project_id] -= min(rows, self._max_rows)
        self._rows += Counter()  # forgets projects without rows
        self.running -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            waiter = min(self._waiting, key=lambda waiter: self._rows[waiter.project_id])
            if self._rows.total() + waiter.rows > self._max_rows:
                return
            self._waiting.remove(waiter)
            self._rows[waiter.project_id] += waiter.rows
            self.running += 1
            if not waiter.turn.done():
                waiter.turn.set_result(None)

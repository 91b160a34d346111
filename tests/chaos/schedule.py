"""Which fault hits which instant, in which order: the seed decides all of it.

Owns the matrix of combinations that make sense. Knows nothing of how a fault is done.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, get_args

from core.failpoints import Instant

HELD: Final[tuple[str, ...]] = get_args(Instant)
"""Instants at which a process of the service waits for us."""

BETWEEN: Final = "between"
SUBMIT: Final = "submit"
GENERATE: Final = "generate"

INSTANTS: Final = (*HELD, BETWEEN, SUBMIT, GENERATE)
"""All rows of the matrix: `between` is any moment, the last two have a request on its way."""

TRAINER_BUSY: Final = (
    "base.load",
    "train.step",
    "checkpoint.write",
    "checkpoint.upload",
    "events.flush",
)
"""Instants at which the trainer has work to lose; it is itself at the first three."""

_WORK = (*HELD, BETWEEN)

MATRIX: Final[dict[str, tuple[str, ...]]] = {
    "kill trainer": (*TRAINER_BUSY, "artifact.upload", BETWEEN),
    "kill worker": _WORK,
    "stop worker past its lease": _WORK,
    "jump worker's clock": _WORK,
    "kill API": ("train.step", "publish.commit", "publish.committed", BETWEEN, SUBMIT, GENERATE),
    "kill engine": ("train.step", "publish.committed", BETWEEN, GENERATE),
    "flush Redis": (*_WORK, SUBMIT),
    "restart Redis": (*_WORK, SUBMIT),
    "restart Postgres": (*_WORK, SUBMIT),
    "kill Postgres": (*_WORK, SUBMIT),
    "fill disk": (
        "train.step",
        "checkpoint.write",
        "checkpoint.upload",
        "artifact.upload",
        BETWEEN,
    ),
    "wake workers twice": (*_WORK, SUBMIT),
}
"""Fault → the instants at which it is done."""

PAIRS: Final = tuple((instant, fault) for fault, instants in MATRIX.items() for instant in instants)

# How often a process may pass before it is held; instants that are not here come once a job.
_FREQUENT = {"train.step": 25, "events.flush": 8, "checkpoint.write": 3, "checkpoint.upload": 3}
_MAX_DELAY_SECONDS = 1.0


@dataclass(frozen=True)
class Injection:
    """One fault to be done.

    Attributes:
        number: Position in the schedule, from 1.
        instant: When.
        fault: What.
        occurrence: Which time that the instant is reached, from 1.
        fraction: From 0 to 1; what else is a matter of chance in a fault: a delay, a direction.
    """

    number: int
    instant: str
    fault: str
    occurrence: int
    fraction: float

    @property
    def delay_seconds(self) -> float:
        """How long to wait before a fault at no particular instant."""
        return self.fraction * _MAX_DELAY_SECONDS

    def __str__(self) -> str:
        return f"#{self.number} {self.fault} at {self.instant}"


def plan(seed: int, count: int, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[Injection]:
    """Return a schedule: all pairs in a random order, then all again in another, up to `count`."""
    chance = random.Random(seed)
    schedule: list[Injection] = []
    while len(schedule) < count:
        for instant, fault in chance.sample(list(pairs), len(pairs))[: count - len(schedule)]:
            schedule.append(
                Injection(
                    number=len(schedule) + 1,
                    instant=instant,
                    fault=fault,
                    occurrence=chance.randint(1, _FREQUENT.get(instant, 1)),
                    fraction=chance.random(),
                )
            )
    return schedule


class Agenda:
    """What is still to be done: the next few injections are due, whichever instant comes first.

    Not safe for threads; the caller holds a lock.

    Args:
        schedule: From `plan`.
        window: How many are due at a time.
    """

    def __init__(self, schedule: Sequence[Injection], window: int) -> None:
        self._waiting = list(schedule)
        self._window = window
        self._passed: Counter[int] = Counter()
        self._deferred: Counter[int] = Counter()
        self.unreached: list[Injection] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def at(self, instant: str) -> Injection | None:
        """Count that an instant is reached; return what is due at this occurrence."""
        for injection in self._waiting[: self._window]:
            if injection.instant == instant:
                self._passed[injection.number] += 1
                if self._passed[injection.number] < injection.occurrence:
                    return None
                self._waiting.remove(injection)
                return injection
        return None

    def timed(self) -> Injection | None:
        """Return the first of all if it needs no process to come anywhere."""
        if self._waiting and self._waiting[0].instant not in HELD:
            return self._waiting.pop(0)
        return None

    def put_back(self, injection: Injection) -> None:
        """Take back what could not be done; it is due again."""
        self._waiting.insert(0, injection)

    def postpone(self) -> None:
        """Move the first to the end: its instant does not come; give it up the third time."""
        if not self._waiting:
            return
        injection = self._waiting.pop(0)
        self._deferred[injection.number] += 1
        if self._deferred[injection.number] < 3:
            self._waiting.append(injection)
        else:
            self.unreached.append(injection)

"""Which requests wait and which run: the policy alone, without a tensor or a thread.

Owns the queues and the order of turns. A request passes `waiting` → `preparing` → `ready` →
`running`; each way on needs something that others give back without needing more themselves, so
nothing can wait in a circle:

    waiting → preparing    rows, memory for its base model and a place in the adapter bank
    preparing → ready      its base model, adapter and prompt are there
    ready → running        memory for its rows

Projects take turns by the tokens that they were given (Sheng et al., 2024, "Fairness in Serving
Large Language Models"). Within a project the order is that of arrival. What cannot go on yet may be
overtaken, but only so often; then everybody waits for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator

from core.errors import Unavailable
from core.inference.work import Work

# So often may others go first when a request lacks something that they do not need.
_MOST_OVERTAKEN = 32


class Scheduler:
    """Requests by what they wait for; used from one thread only.

    Args:
        max_waiting: Requests that may wait to be prepared.
        max_rows: Answers that may be prepared or computed at a time. A project that has none may
            go above by a quarter, so that it need not wait for another one's long answers.
    """

    def __init__(self, *, max_waiting: int, max_rows: int) -> None:
        self._max_waiting = max_waiting
        self._max_rows = max_rows
        self._guest_rows = max_rows // 4
        self._waiting: dict[str, deque[Work]] = {}
        self._admitted: dict[Work, None] = {}
        self.ready: deque[Work] = deque()
        self._given_tokens: dict[str, float] = {}
        self._rows = 0
        self._rows_by_project: Counter[str] = Counter()
        self.prefilling: deque[Work] = deque()
        self.decoding: list[Work] = []

    @property
    def waiting(self) -> int:
        """Requests that nothing has been done for yet."""
        return sum(map(len, self._waiting.values()))

    @property
    def admitted(self) -> list[Work]:
        """Requests that are prepared or computed."""
        return list(self._admitted)

    @property
    def running(self) -> list[Work]:
        """Requests whose rows have their memory."""
        return [*self.prefilling, *self.decoding]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.decoding or self.prefilling)

    def everything(self) -> Iterator[Work]:
        """Yield all requests there are."""
        yield from self._admitted
        for queue in self._waiting.values():
            yield from queue

    def enqueue(self, work: Work) -> Work | None:
        """Take in a request.

        Returns:
            The request that had to leave a full queue for it: the latest of the project that has
            the most in it.

        Raises:
            Unavailable: Code `engine_full`; no other project has more waiting than its own.
        """
        left = None
        own = self._waiting.get(work.project_id, ())
        if self.waiting >= self._max_waiting:
            greediest = max(self._waiting.values(), key=len, default=deque())
            if len(greediest) <= len(own) + 1:
                raise engine_full(self.waiting)
            left = greediest[-1]
            self.remove(left)
        if not own:
            self._begin(work.project_id)
        self._waiting.setdefault(work.project_id, deque()).append(work)
        return left

    def admit(self, reserve: Callable[[Work], bool]) -> Work | None:
        """Move the next request from `waiting` to `preparing`.

        Args:
            reserve: Takes what the request needs besides rows, or returns False.

        Returns:
            The request; `None` when none can go on.
        """
        if not self._waiting or self._rows >= self._max_rows + self._guest_rows:
            return None
        work = _first(self._in_turn(), lambda one: self._has_rows(one) and reserve(one))
        if work is None:
            return None
        self._leave_queue(work)
        self._admitted[work] = None
        self._rows += work.rows
        self._rows_by_project[work.project_id] += work.rows
        self._given_tokens[work.project_id] += work.expected_tokens
        work.overtaken = 0
        return work

    def prepared(self, work: Work) -> None:
        """Move a request to `ready`: all that it lacks is memory for its rows."""
        self.ready.append(work)

    def start(self, fits: Callable[[Work], bool]) -> Work | None:
        """Move the next request from `ready` to `running`.

        Args:
            fits: Whether there is memory for a request's rows beside those that run.
        """
        work = _first(self.ready, fits)
        if work is not None:
            self.ready.remove(work)
            self.prefilling.append(work)
        return work

    def start_decoding(self, work: Work) -> None:
        """Note that a running request's prompt is complete."""
        self.prefilling.remove(work)
        self.decoding.append(work)

    def remove(self, work: Work) -> bool:
        """Forget a request, wherever it is; return whether it was there."""
        if work not in self._admitted:
            found = self._leave_queue(work)
            self._forget_idle(work.project_id)
            return found
        del self._admitted[work]
        self._rows -= work.rows
        self._rows_by_project[work.project_id] -= work.rows
        if not self._rows_by_project[work.project_id]:
            del self._rows_by_project[work.project_id]
        if work.project_id in self._given_tokens:
            self._given_tokens[work.project_id] += work.computed_tokens - work.expected_tokens
        for queue in (self.ready, self.prefilling, self.decoding):
            if work in queue:
                queue.remove(work)
        self._forget_idle(work.project_id)
        return True

    def _begin(self, project_id: str) -> None:
        """Let a project that comes back start with the least that others have been given."""
        if project_id not in self._given_tokens:
            self._given_tokens[project_id] = min(self._given_tokens.values(), default=0.0)

    def _forget_idle(self, project_id: str) -> None:
        # Unused turns are not saved up, and projects that have gone take no memory.
        if project_id not in self._waiting and project_id not in self._rows_by_project:
            self._given_tokens.pop(project_id, None)

    def _in_turn(self) -> Iterator[Work]:
        def given(project_id: str) -> tuple[float, int]:
            return self._given_tokens[project_id], self._rows_by_project[project_id]

        for project_id in sorted(self._waiting, key=given):
            yield from self._waiting[project_id]

    def _has_rows(self, work: Work) -> bool:
        if not self._rows:
            return True
        guest = not self._rows_by_project[work.project_id]
        return self._rows + work.rows <= self._max_rows + guest * self._guest_rows

    def _leave_queue(self, work: Work) -> bool:
        queue = self._waiting.get(work.project_id, ())
        if work not in queue:
            return False
        assert isinstance(queue, deque)
        queue.remove(work)
        if not queue:
            del self._waiting[work.project_id]
        return True


def engine_full(waiting: int) -> Unavailable:
    """Return the refusal of a request for which the queue has no room."""
    return Unavailable(
        f"{waiting} requests are waiting for the engine already",
        code="engine_full",
        retry_after_seconds=2,
        hint="Send the request again a little later.",
    )


def _first(candidates: Iterator[Work] | deque[Work], accept: Callable[[Work], bool]) -> Work | None:
    """Return the first that is accepted, unless one before it has been overtaken too often."""
    overtaken: list[Work] = []
    for work in candidates:
        if accept(work):
            for other in overtaken:
                other.overtaken += 1
            return work
        if work.overtaken >= _MOST_OVERTAKEN:
            return None
        overtaken.append(work)
    return None

"""One request on its way through the engine, and the clock that runs along."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Union

from core.errors import TunesmithError, from_wire, to_wire
from core.inference.adapter_bank import AdapterKey
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Done,
    EngineEvent,
    Failed,
    GenerateRequest,
    ResidentAdapter,
    Started,
    Timings,
)
from core.inference.generation import Answer
from core.inference.prompts import EncodedPrompt

if TYPE_CHECKING:
    from core.inference.decoding import Decoding
    from core.inference.loaded_base import LoadedBase

# What becomes of a piece of work: events, or an error in place of the first one.
Outcome = Union["EngineEvent", ResidentAdapter, TunesmithError]


class Work:
    """A request for answers, or, without one, for making an adapter resident.

    Args:
        base_model: Whose weights compute.
        adapter: On top of them, if any.
        request: What to answer; `None` only loads.
        deliver: Takes each outcome; called in the engine thread.
    """

    def __init__(
        self,
        base_model: BaseModelRef,
        adapter: AdapterRef | None,
        request: GenerateRequest | None,
        deliver: Callable[[Outcome], None],
    ) -> None:
        self.base_model = base_model
        self.adapter = adapter
        self.request = request
        self.deliver = deliver
        self.cancelled = False
        self.key = AdapterKey(base_model.digest, adapter.digest) if adapter else None
        self.rows = request.sampling.n if request else 0
        self._submitted = self._admitted = self._loaded = time.monotonic()
        self._first_token: float | None = None
        self._started = False
        self._decoding: Decoding
        self._answers: list[Answer] = []
        self._prompt_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(answer.finish_reason is not None for answer in self._answers)

    def note_admitted(self) -> None:
        """The wait in the queue is over."""
        self._admitted = self._loaded = time.monotonic()

    def note_loaded(self) -> None:
        """Base model and adapter are there."""
        self._loaded = time.monotonic()

    def start(self, base: LoadedBase, prompt: EncodedPrompt) -> None:
        """Make ready for `step` and deliver `Started`."""
        assert self.request is not None
        sampling = self.request.sampling
        digest = self.adapter.digest if self.adapter else None
        self._decoding = base.start(digest, prompt.ids, sampling)
        self._answers = [
            Answer(
                index,
                prompt_ids=prompt.ids,
                decode=base.decode,
                token_text=base.token_text,
                eos_ids=base.eos_ids,
                sampling=sampling,
                max_new_tokens=prompt.max_new_tokens,
            )
            for index in range(sampling.n)
        ]
        self._prompt_tokens = len(prompt.ids)
        self._started = True
        self.deliver(
            Started(
                prompt_tokens=len(prompt.ids),
                base_digest=base.facts.digest,
                adapter_digest=digest,
                precision=base.precision,
            )
        )

    def step(self) -> int:
        """Compute one step and deliver its events, `Done` last of all.

        Returns:
            How many tokens were chosen.
        """
        choices = self._decoding.advance()
        if choices and self._first_token is None:
            self._first_token = time.monotonic()
        for row, choice in choices:
            for event in self._answers[row].push(choice):
                self.deliver(event)
        ended = {answer.index for answer in self._answers if answer.finish_reason is not None}
        if self.finished:
            self.deliver(self._done())
        else:
            self._decoding.drop(ended)
        return len(choices)

    def fail(self, error: TunesmithError) -> None:
        """Deliver an error: as itself before the first event, as `Failed` afterwards."""
        wire = to_wire(error)
        # A copy: several requests may fail for one reason, and each raises its own.
        self.deliver(Failed(error=wire) if self._started else from_wire(wire))

    def _done(self) -> Done:
        now = time.monotonic()
        first_token = self._first_token or now

        def milliseconds(start: float, end: float) -> float:
            return round((end - start) * 1000, 3)

        return Done(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(answer.completion_tokens for answer in self._answers),
            timings=Timings(
                queue_ms=milliseconds(self._submitted, self._admitted),
                load_ms=milliseconds(self._admitted, self._loaded),
                first_token_ms=milliseconds(self._submitted, first_token),
                total_ms=milliseconds(self._submitted, now),
            ),
        )

"""One request on its way through the engine, and the clock that runs along."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from core.inference.generation import Answer, TokenChoice
from core.inference.prefix_store import BLOCK_TOKENS, PrefixStore, block_keys

if TYPE_CHECKING:
    from core.inference.loaded_base import LoadedBase
    from core.inference.prompts import EncodedPrompt
    from core.inference.rows import Row
    from core.inference.sampling import RowSampler

# Roughly, for languages in Latin script.
_CHARACTERS_PER_TOKEN = 4

# What becomes of a piece of work: events, or an error in place of the first one.
Outcome = Union["EngineEvent", ResidentAdapter, TunesmithError]


@dataclass(eq=False)
class Line:
    """One answer of a request: its row, how its tokens are chosen, and its text."""

    row: Row
    sampler: RowSampler
    answer: Answer
    last_token: int = -1


class Work:
    """A request for answers, or, without one, for making an adapter resident.

    Args:
        base_model: Whose weights compute.
        adapter: On top of them, if any.
        request: What to answer; `None` only loads.
        deliver: Takes each outcome; called in the engine thread.
        keep: Let the adapter stay in memory when nobody uses it.

    Attributes:
        cancelled: Nobody wants the answer any more.
        ended: It was given up or is complete.
        deadline: Monotonic time at which it is given up.
        overtaken: How often others went first while it lacked something.
        refusal: Why it cannot be prepared.
        base_pinned: Whether it holds its base model in memory.
        adapter_pinned: The same of its adapter.
        row_lengths: How long each of its rows may become.
    """

    def __init__(
        self,
        base_model: BaseModelRef,
        adapter: AdapterRef | None,
        request: GenerateRequest | None,
        deliver: Callable[[Outcome], None],
        *,
        keep: bool = False,
    ) -> None:
        self.base_model = base_model
        self.adapter = adapter
        self.request = request
        self.deliver = deliver
        self.keep = keep
        self.cancelled = False
        self.ended = False
        self.overtaken = 0
        self.refusal: TunesmithError | None = None
        self.base_pinned = False
        self.adapter_pinned = False
        self.project_id = request.project_id if request else ""
        self.key = AdapterKey(base_model.digest, adapter.digest) if adapter else None
        self.rows = request.sampling.n if request else 0
        self._submitted = self._admitted = self._loaded = time.monotonic()
        limit = request.deadline_seconds if request else None
        self.deadline = None if limit is None else self._submitted + limit
        self._first_token: float | None = None
        self._started = False
        self._lines: list[Line] = []
        self.base: LoadedBase
        self.prefilled = False
        self._prompt_tokens = 0
        self._prefix_keys: list[bytes] = []
        self._shared_blocks = 0
        self.row_lengths: list[int] = []

    @property
    def expected_tokens(self) -> int:
        """What it will probably compute, for the order of turns."""
        if self.request is None:
            return 0
        texts = [message.content for message in self.request.messages or ()]
        characters = len(self.request.prompt or "") + sum(map(len, texts))
        new_tokens = self.request.sampling.max_new_tokens * self.rows
        return characters // _CHARACTERS_PER_TOKEN + new_tokens

    @property
    def computed_tokens(self) -> int:
        """What it has computed so far."""
        return self._prompt_tokens + sum(line.answer.completion_tokens for line in self._lines)

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(line.answer.finish_reason is not None for line in self._lines)

    def note_admitted(self) -> None:
        """The wait in the queue is over."""
        self._admitted = self._loaded = time.monotonic()

    def note_loaded(self) -> None:
        """Base model and adapter are there."""
        self._loaded = time.monotonic()

    def start(self, base: LoadedBase, prompt: EncodedPrompt) -> None:
        """Make ready for reading the prompt."""
        assert self.request is not None
        sampling = self.request.sampling
        digest = self.adapter.digest if self.adapter else None
        self.base = base
        first = base.rows.open_row(digest, prompt.ids)
        self._lines = [
            Line(
                row=first,
                sampler=base.sampler(sampling, index, prompt),
                answer=Answer(
                    index,
                    prompt_ids=prompt.ids,
                    decode=base.decode,
                    token_text=base.token_text,
                    end_ids=base.end_ids(sampling),
                    sampling=sampling,
                    max_new_tokens=prompt.max_new_tokens,
                    stream=self.request.stream,
                ),
            )
            for index in range(sampling.n)
        ]
        self._prompt_tokens = len(prompt.ids)
        self._prefix_keys = block_keys(
            prompt.ids,
            base_digest=base.facts.digest,
            adapter_digest=digest,
            project_id=self.project_id,
        )
        self.row_lengths = [len(prompt.ids) + prompt.max_new_tokens] * sampling.n

    def reuse(self, prefixes: PrefixStore) -> None:
        """Take over what others have computed of the same prompt since the last piece."""
        row = self._lines[0].row
        first = row.length // BLOCK_TOKENS
        found = prefixes.find(self._prefix_keys, first)
        if found:
            before = row.length
            self.base.rows.write_cache(row, first * BLOCK_TOKENS, found)
            prefixes.reused_tokens += row.length - before
        self._shared_blocks = max(self._shared_blocks, first + len(found))

    def _share(self, prefixes: PrefixStore) -> None:
        """Let others take over what is computed of the prompt."""
        row = self._lines[0].row
        for index in range(
            self._shared_blocks, min(row.length // BLOCK_TOKENS, len(self._prefix_keys))
        ):
            start = index * BLOCK_TOKENS
            if prefixes.wants(self._prefix_keys[index]):
                block = self.base.rows.read_cache(row, start, start + BLOCK_TOKENS)
                if block is not None:
                    prefixes.put(
                        self.base.facts.digest, self._prefix_keys, index, block, block.nbytes
                    )
            self._shared_blocks = index + 1

    @property
    def prompt_row(self) -> Row:
        """The row that the prompt is read in."""
        return self._lines[0].row

    def next_piece(self, max_tokens: int) -> Sequence[int]:
        """Return the prompt's next tokens, all of them where the model cannot read in pieces."""
        row = self.prompt_row
        whole = self.base.rows.reads_whole_prompts
        end = len(row.prompt_ids) if whole else row.length + max_tokens
        return row.prompt_ids[row.length : end]

    @property
    def next_block(self) -> bytes | None:
        """The key of the block that the prompt's next token is in; `None` behind the last one."""
        index = self.prompt_row.length // BLOCK_TOKENS
        return self._prefix_keys[index] if index < len(self._prefix_keys) else None

    def note_piece(self, prefixes: PrefixStore) -> list[Line]:
        """Share what was read; return the answers that get their first token now, if any.

        `Started` is delivered with the first piece: by then the adapter has shown that it may
        answer.

        Args:
            prefixes: Takes what is computed, for others.
        """
        if not self._started:
            self._started = True
            self.deliver(self._describe_start())
        first, *others = self._lines
        # Before any token: an answer may end with its first one, and its row with it.
        self._share(prefixes)
        if not first.row.prefilled:
            return []
        for line in others:
            line.row = self.base.rows.fork(first.row)
        self.prefilled = True
        self._first_token = time.monotonic()
        return self._lines

    def live_lines(self) -> list[Line]:
        """Return the answers that want another token."""
        return [line for line in self._lines if line.answer.finish_reason is None]

    def push(self, line: Line, choice: TokenChoice) -> None:
        """Take an answer's next token and deliver its events, `Done` last of all.

        The row is given back as soon as its answer has ended.
        """
        line.last_token = choice.token_id
        for event in line.answer.push(choice):
            self.deliver(event)
        if line.answer.finish_reason is not None:
            self.base.rows.close_row(line.row)
        if self.finished:
            self.deliver(self._done())

    def close(self) -> None:
        """Give the rows back."""
        for line in self._lines:
            self.base.rows.close_row(line.row)

    def fail(self, error: TunesmithError) -> None:
        """Deliver an error: as itself before the first event, as `Failed` afterwards."""
        wire = to_wire(error)
        # A copy: several requests may fail for one reason, and each raises its own.
        self.deliver(Failed(error=wire) if self._started else from_wire(wire))

    def _describe_start(self) -> Started:
        return Started(
            prompt_tokens=self._prompt_tokens,
            base_digest=self.base.facts.digest,
            adapter_digest=self.adapter.digest if self.adapter else None,
            precision=self.base.precision,
        )

    def _done(self) -> Done:
        now = time.monotonic()
        first_token = self._first_token or now

        def milliseconds(start: float, end: float) -> float:
            return round((end - start) * 1000, 3)

        return Done(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(line.answer.completion_tokens for line in self._lines),
            timings=Timings(
                queue_ms=milliseconds(self._submitted, self._admitted),
                load_ms=milliseconds(self._admitted, self._loaded),
                first_token_ms=milliseconds(self._submitted, first_token),
                total_ms=milliseconds(self._submitted, now),
            ),
        )

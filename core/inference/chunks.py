"""What one pass computes: the next token of every running answer, and pieces of prompts.

Owns how a pass is put together and what becomes of its logits. Knows no torch: rows compute, and
`engine_thread` says when.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import TunesmithError
from core.inference.generation import TokenChoice
from core.inference.prefill_pace import PrefillPace
from core.inference.prefix_store import PrefixStore
from core.inference.preparation import deliberate
from core.inference.scheduler import Scheduler
from core.inference.work import Line, Work

if TYPE_CHECKING:
    from torch import Tensor

    from core.inference.rows import Row

# Whose token it is, or for which request there is none.
Chosen = tuple[Work, Line | None, TokenChoice | TunesmithError]


@dataclass(frozen=True)
class Chunk:
    """Tokens that one row takes in.

    Attributes:
        work: The request.
        row: Its row.
        token_ids: The tokens.
        line: The answer whose last token this is; `None` for a piece of a prompt.
    """

    work: Work
    row: Row
    token_ids: Sequence[int]
    line: Line | None


def next_pass(
    scheduler: Scheduler,
    pace: PrefillPace,
    prefixes: PrefixStore,
    fail: Callable[[Work, TunesmithError], None],
) -> list[list[Chunk]]:
    """Return the chunks that are due, those of each base model by themselves.

    Prompts take turns, as far as the pace allows. Of those that go on in the same way only the one
    that is furthest is read; the others wait for what it leaves in the prefix store.
    """
    chunks: dict[int, list[Chunk]] = {}
    for work in scheduler.decoding:
        own = chunks.setdefault(id(work.base), [])
        own += [Chunk(work, line.row, (line.last_token,), line) for line in work.live_lines()]
    reading = _read_next(scheduler, prefixes, fail)
    tokens_left = pace.tokens(answers=sum(map(len, chunks.values())), prompts=len(reading))
    for work in reading:
        if tokens_left <= 0:
            break
        piece = work.next_piece(tokens_left)
        tokens_left -= len(piece)
        chunks.setdefault(id(work.base), []).append(Chunk(work, work.prompt_row, piece, None))
        # To the back: whoever did not get a piece now is first in the next pass.
        scheduler.prefilling.remove(work)
        scheduler.prefilling.append(work)
    return list(chunks.values())


def _read_next(
    scheduler: Scheduler, prefixes: PrefixStore, fail: Callable[[Work, TunesmithError], None]
) -> list[Work]:
    """Take over what others have read, and return whose prompts are to be read, in their order."""
    for work in list(scheduler.prefilling):
        try:
            work.reuse(prefixes)
        except Exception as error:
            fail(work, deliberate(error))
    furthest: dict[bytes, Work] = {}
    for work in scheduler.prefilling:
        block = work.next_block
        if block is not None:
            leader = furthest.setdefault(block, work)
            if work.prompt_row.length > leader.prompt_row.length:
                furthest[block] = work
    return [
        work
        for work in scheduler.prefilling
        if (block := work.next_block) is None or furthest[block] is work
    ]


def compute(chunks: Sequence[Chunk]) -> Tensor:
    """Compute chunks of one base model in one pass; no row has changed when this raises.

    Returns:
        The logits after each chunk, (chunks, vocabulary).
    """
    base = chunks[0].work.base
    return base.extend([chunk.row for chunk in chunks], [chunk.token_ids for chunk in chunks])


def choose(chunks: Sequence[Chunk], logits: Tensor, prefixes: PrefixStore) -> list[Chosen]:
    """Choose the next token of each answer; prompts that are not complete have none.

    The rows have taken their tokens by now, so that the pass cannot be repeated: what fails here
    fails the request that it is for.
    """
    chosen: list[Chosen] = []
    works: list[Work] = []
    lines: list[Line] = []
    places: list[int] = []
    for place, chunk in enumerate(chunks):
        refusal = chunk.work.base.refusal(chunk.row.adapter)
        if refusal is not None:
            chosen.append((chunk.work, None, refusal))
            continue
        try:
            own = [chunk.line] if chunk.line else chunk.work.note_piece(prefixes)
        except Exception as error:
            chosen.append((chunk.work, None, deliberate(error)))
            continue
        works += [chunk.work] * len(own)
        lines += own
        places += [place] * len(own)
    if not lines:
        return chosen
    try:
        choices = chunks[0].work.base.choose(logits, places, lines)
    except Exception as error:
        failure = deliberate(error)
        return chosen + [(work, None, failure) for work in works]
    return chosen + list(zip(works, lines, choices, strict=True))


def prompt_tokens(chunks: Collection[Chunk]) -> int:
    """Return how many of the tokens are prompts'."""
    return sum(len(chunk.token_ids) for chunk in chunks if chunk.line is None)

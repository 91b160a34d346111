"""What the rows of requests take, so that they are started only when there is memory for them.

Counted is what they take when every answer has become as long as it may: once started, a request
never has to wait for memory or to give it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from core.errors import InvalidInput

if TYPE_CHECKING:
    from core.inference.loaded_base import LoadedBase
    from core.inference.prompts import EncodedPrompt
    from core.inference.work import Work


def fits(works: Iterable[Work], limit_bytes: int) -> bool:
    """Tell whether requests that have been started or are ready can run side by side."""
    bases: dict[LoadedBase, tuple[list[int], set[str]]] = {}
    for work in works:
        lengths, adapters = bases.setdefault(work.base, ([], set()))
        lengths += work.row_lengths
        if work.adapter is not None:
            adapters.add(work.adapter.digest)
    needed = sum(base.rows.bytes_for(*rows) for base, rows in bases.items())
    return needed <= limit_bytes


def check_alone(work: Work, base: LoadedBase, prompt: EncodedPrompt, limit_bytes: int) -> None:
    """Check that a request can run at all.

    Raises:
        InvalidInput: Code `row_memory_exceeded`.
    """
    tokens = len(prompt.ids) + prompt.max_new_tokens
    adapters = {work.adapter.digest} if work.adapter else set()
    needed = base.rows.bytes_for([tokens] * work.rows, adapters)
    if needed > limit_bytes:
        raise InvalidInput(
            f"{work.rows} answers of {tokens:,} tokens, the prompt included, take {needed:,} bytes "
            f"of memory; the engine computes with {limit_bytes:,} bytes at most",
            code="row_memory_exceeded",
            field="max_new_tokens",
            hint="Ask for fewer or shorter answers, or raise TUNESMITH_ENGINE_KV_BYTES.",
        )

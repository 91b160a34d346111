"""Rows: the growing texts that a base model computes side by side.

Owns what the scheduler and a model say to each other. A row has a prompt, an adapter or none, and
a place in the model's cache; the model never sees requests, and the scheduler never sees tensors
other than logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from core.inference.gates import AdapterWeights


@dataclass(eq=False)
class Row:
    """One text while it grows.

    Attributes:
        adapter: Digest of the adapter that computes it; `None` is the base model.
        prompt_ids: Its prompt.
        length: Tokens in the cache.
        cache: The model's own.
    """

    adapter: str | None
    prompt_ids: list[int]
    length: int = 0
    cache: Any = None

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.length >= len(self.prompt_ids)


class Prepared(Protocol):
    """An adapter as a model wants it."""

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        ...


class RowModel(Protocol):
    """Computes logits for rows of any mixture of adapters; used from one thread."""

    @property
    def precision(self) -> str:
        """How the weights are kept, such as `float32`."""
        ...

    @property
    def reads_whole_prompts(self) -> bool:
        """Whether a prompt cannot be taken in piece by piece."""
        ...

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's logits are to the last bit those of its text by itself.

        Whatever pieces it was read in, and whatever rows are beside it.
        """
        ...

    @property
    def cache_bytes(self) -> int:
        """What open rows take; 0 when there are none."""
        ...

    @property
    def weight_bytes(self) -> int:
        """What the base weights take."""
        ...

    def bytes_for(self, lengths: Sequence[int], adapters: Collection[str]) -> int:
        """Return what rows of these lengths take side by side, at most.

        Args:
            lengths: Of the rows.
            adapters: The resident adapters that they use.
        """
        ...

    def prepare(self, weights: AdapterWeights) -> Prepared:
        """Return an adapter as `insert` wants it; safe from any thread."""
        ...

    def insert(self, digest: str, prepared: Any) -> set[str]:
        """Make a prepared adapter resident; return the names of the modules that it changes."""
        ...

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        ...

    def logits_of(self, adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text by itself, (tokens, vocabulary)."""
        ...

    def open_row(self, adapter: str | None, prompt_ids: list[int]) -> Row:
        """Return a row of which nothing is computed yet."""
        ...

    def extend(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row, in one pass; no row has changed when this raises.

        Args:
            rows: Each of them once.
            pieces: At least one token for each; the next ones of its prompt, or of its answer.

        Returns:
            The logits after each row's last token, float32, shape (rows, vocabulary).
        """
        ...

    def fork(self, row: Row) -> Row:
        """Return another row that continues the same text."""
        ...

    def read_cache(self, row: Row, start: int, end: int) -> Tensor | None:
        """Return a copy of what some of a row's tokens have in the cache.

        Returns:
            Shape (layers, tokens, …); `None` where rows cannot take it over from one another.
        """
        ...

    def write_cache(self, row: Row, start: int, blocks: Sequence[Tensor]) -> None:
        """Give a row what another one of the same text and adapter has in the cache.

        Args:
            row: Of which at least `start` tokens are computed; its length becomes theirs.
            start: First token.
            blocks: As `read_cache` returned them, one behind the other.
        """
        ...

    def close_row(self, row: Row) -> None:
        """Forget a row and give its place in the cache back."""
        ...

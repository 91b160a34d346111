"""What a model asks of a decoder: one pass over tokens of several rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from core.inference.lean.adapters import LayerSizes, PlacedAdapter
from core.inference.lean.decoder import Decoder


class Piece(NamedTuple):
    """Tokens of one row that follow each other.

    Attributes:
        place: Where the row is in the cache, `Row.cache`.
        start: Position of the first one.
        token_ids: The tokens.
        digest: The row's adapter; `None` is the base model.
        adapter: That adapter as `PassDecoder.prepare` returned it.
    """

    place: Any
    start: int
    token_ids: Sequence[int]
    digest: str | None = None
    adapter: Any = None


class PassDecoder(Protocol):
    """Computes passes over one base model; used from one thread, but for `prepare`.

    Attributes:
        weights: The model.
        rows_are_independent: Whether neighbours leave a row's logits as they are to the last bit.
    """

    weights: Decoder
    rows_are_independent: bool

    def make_cache(self, layers: int, kv_heads: int, head_dim: int) -> Any:
        """Return an empty cache such as `compute` takes; see `KvCache`."""
        ...

    def prepare(self, adapter: PlacedAdapter, sizes: LayerSizes) -> Any:
        """Return an adapter as passes want it, with its size as `bytes`; safe from any thread."""
        ...

    def bytes_beside(self, adapters: Sequence[Any]) -> int:
        """Return what a pass with these adapters takes besides them."""
        ...

    def forget(self, digest: str) -> None:
        """Note that an adapter is resident no longer."""
        ...

    def compute(self, pieces: Sequence[Piece], cache: Any, *, every_token: bool = False) -> Tensor:
        """Compute pieces of different rows and write them to the cache.

        Args:
            pieces: At most one for each row.
            cache: One of `make_cache`, with room for them.
            every_token: Return the logits of all tokens rather than of each piece's last one.

        Returns:
            Float32, shape (pieces or tokens, vocabulary).
        """
        ...

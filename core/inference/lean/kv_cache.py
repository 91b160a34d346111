"""What a model asks of a cache: rows' keys and values, as the passes of its decoder want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from core.inference.rows import Row


class KvShape(NamedTuple):
    """What keys and values of a model look like.

    Attributes:
        layers: Number of layers.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        dtype: Of keys and values.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def position_bytes(self) -> int:
        """What one token takes."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class KvCache(Protocol):
    """Keeps keys and values; notes in `Row.cache` where, `None` being nowhere."""

    @property
    def bytes(self) -> int:
        """What all rows take; 0 when there are none."""
        ...

    def bytes_for(self, lengths: Sequence[int]) -> int:
        """Return what rows of these lengths take side by side, at most."""
        ...

    def make_room(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Have room for the next tokens of some rows.

        Args:
            rows: Each of them once.
            counts: Tokens that each is going to take in.
        """
        ...

    def fork(self, row: Row, twin: Row) -> None:
        """Let a new row begin with all that another one has."""
        ...

    def read(self, row: Row, start: int, end: int) -> Tensor:
        """Return a copy of some positions, (layers, positions, 2, kv_heads, head_dim)."""
        ...

    def write(self, row: Row, start: int, content: Tensor) -> None:
        """Overwrite positions for which there is room; shape as from `read`."""
        ...

    def release(self, row: Row) -> None:
        """Forget a row and give its memory back."""
        ...

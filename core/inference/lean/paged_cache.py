"""Keys and values in pages, each for a number of positions of one row (Kwon et al., 2023).

A row takes another page when it needs one, and nothing is ever moved: neither when it grows nor
when others come or leave. A row that continues another one's text shares the pages that are full.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.inference.lean.kv_cache import KvShape
from core.inference.rows import Row

# A multiple of what the kernel scores at once. Smaller ones waste less, larger ones are fewer.
PAGE_POSITIONS = 128


class PageTable:
    """The pages of one row.

    Attributes:
        pages: Each (layers, `PAGE_POSITIONS`, 2, kv_heads, head_dim).
        address: Where the kernel finds their addresses, one behind the other.
    """

    def __init__(self) -> None:
        self.pages: list[Tensor] = []
        self._addresses = np.empty(0, np.uintp)
        self.address = 0

    def append(self, page: Tensor) -> None:
        """Add the page that follows."""
        self.pages.append(page)
        self._addresses = np.array([one.data_ptr() for one in self.pages], np.uintp)
        self.address = self._addresses.ctypes.data


class PagedCache:
    """The pages of all rows; see `core.inference.lean.kv_cache.KvCache`. On the CPU.

    Args:
        shape: What keys and values look like.
    """

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self._tables: set[PageTable] = set()

    @property
    def bytes(self) -> int:
        """What all pages take; a shared one counts once."""
        pages = {id(page) for table in self._tables for page in table.pages}
        return len(pages) * PAGE_POSITIONS * self._shape.position_bytes

    def bytes_for(self, lengths: Sequence[int]) -> int:
        """Return what rows of these lengths take side by side, with nothing shared."""
        pages = sum(-(-length // PAGE_POSITIONS) for length in lengths)
        return pages * PAGE_POSITIONS * self._shape.position_bytes

    def make_room(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Have room for the next tokens of some rows; see `KvCache`."""
        for row, count in zip(rows, counts, strict=True):
            table = self._table_of(row)
            while len(table.pages) * PAGE_POSITIONS < row.length + count:
                table.append(self._new_page())

    def fork(self, row: Row, twin: Row) -> None:
        """Let a new row begin with all that another one has; see `KvCache`."""
        full, rest = divmod(row.length, PAGE_POSITIONS)
        own = self._table_of(twin)
        for page in row.cache.pages[:full]:
            own.append(page)
        if rest:
            page = self._new_page()
            page[:, :rest] = row.cache.pages[full][:, :rest]
            own.append(page)

    def read(self, row: Row, start: int, end: int) -> Tensor:
        """Return a copy of some positions; see `KvCache`."""
        spans = [page[:, first:last] for page, first, last in _spans(row.cache, start, end)]
        return torch.cat(spans, dim=1)

    def write(self, row: Row, start: int, content: Tensor) -> None:
        """Overwrite positions for which there is room; see `KvCache`."""
        done = 0
        for page, first, last in _spans(row.cache, start, start + content.size(1)):
            page[:, first:last] = content[:, done : done + last - first]
            done += last - first

    def release(self, row: Row) -> None:
        """Forget a row and give its memory back; see `KvCache`."""
        self._tables.remove(row.cache)
        row.cache = None

    def _table_of(self, row: Row) -> PageTable:
        if row.cache is None:
            row.cache = PageTable()
            self._tables.add(row.cache)
        table: PageTable = row.cache
        return table

    def _new_page(self) -> Tensor:
        # Nothing is read that was not written before.
        return torch.empty(
            (self._shape.layers, PAGE_POSITIONS, 2, self._shape.kv_heads, self._shape.head_dim),
            dtype=self._shape.dtype,
        )


def _spans(table: PageTable, start: int, end: int) -> list[tuple[Tensor, int, int]]:
    """Return the pages that hold some positions, and which of theirs those are."""
    spans = []
    for index in range(start // PAGE_POSITIONS, -(-end // PAGE_POSITIONS)):
        begin = index * PAGE_POSITIONS
        spans.append((table.pages[index], max(start - begin, 0), min(end - begin, PAGE_POSITIONS)))
    return spans

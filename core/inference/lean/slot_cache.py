"""Keys and values of all rows in one tensor for each layer, for decoders that view it as a whole.

All rows have room for the longest of them. The room changes only when more is needed, and becomes
then just what the rows of that moment need.

The rows of a step must lie side by side, so rows are moved when others leave; that copies one row,
while collecting rows from all over would copy every row in every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.inference.lean.kv_cache import KvShape
from core.inference.rows import Row

_SLOTS_STEP = 4
_CAPACITY_STEP = 128


class SlotCache:
    """A slot for each row; see `core.inference.lean.kv_cache.KvCache`.

    `Row.cache` is the number of its slot. Rows that take in one token lie in the first slots.

    Args:
        shape: What keys and values look like.
        device: Where the tensors are.

    Attributes:
        tensors: For each layer (slots, capacity, 2, kv_heads, head_dim).
        capacity: Positions there are in each slot.
    """

    def __init__(self, shape: KvShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._rows: list[Row | None] = []
        self._room = 0
        self.tensors: list[Tensor] = []
        self.capacity = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def bytes_for(self, lengths: Sequence[int]) -> int:
        """Return what a rectangle for rows of these lengths takes."""
        slots = _round_up(len(lengths), _SLOTS_STEP)
        capacity = _round_up(max(lengths, default=0), _CAPACITY_STEP)
        return slots * capacity * self._shape.position_bytes

    def make_room(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Have room for the next tokens of some rows; see `KvCache`."""
        for row in rows:
            if row.cache is None:
                self._take_slot(row)
        pairs = list(zip(rows, counts, strict=True))
        self._fit(max(row.length + count for row, count in pairs))
        self._bring_to_front([row for row, count in pairs if count == 1])

    def fork(self, row: Row, twin: Row) -> None:
        """Let a new row begin with all that another one has; see `KvCache`."""
        self._take_slot(twin)
        self._fit(row.length)
        self._copy(row.cache, twin.cache, row.length)

    def read(self, row: Row, start: int, end: int) -> Tensor:
        """Return a copy of some positions; see `KvCache`."""
        return torch.stack([tensor[row.cache, start:end] for tensor in self.tensors])

    def write(self, row: Row, start: int, content: Tensor) -> None:
        """Overwrite positions for which there is room; see `KvCache`."""
        for tensor, part in zip(self.tensors, content, strict=True):
            tensor[row.cache, start : start + content.size(1)] = part

    def release(self, row: Row) -> None:
        """Forget a row; the memory goes with the last one; see `KvCache`."""
        self._rows[row.cache] = None
        row.cache = None
        while self._rows and self._rows[-1] is None:
            self._rows.pop()
        if not self._rows:
            self.tensors.clear()
            self._room = self.capacity = 0

    def _take_slot(self, row: Row) -> None:
        if None in self._rows:
            row.cache = self._rows.index(None)
            self._rows[row.cache] = row
        else:
            row.cache = len(self._rows)
            self._rows.append(row)

    def _fit(self, longest: int) -> None:
        """Have room for all rows there are, and for `longest` positions in each."""
        if len(self._rows) <= self._room and longest <= self.capacity:
            return
        self._close_gaps()
        lengths = [row.length for row in self._rows if row is not None]
        self._resize(len(self._rows), max(longest, *lengths))

    def _close_gaps(self) -> None:
        """Move rows from behind to where others have left, so that no room is taken for those."""
        while None in self._rows:
            row = self._rows.pop()
            if row is not None:
                slot = self._rows.index(None)
                self._copy(row.cache, slot, row.length)
                self._rows[slot], row.cache = row, slot

    def _resize(self, slots: int, capacity: int) -> None:
        """Have room for so many rows of so many positions and little more; these stay."""
        slots, capacity = _round_up(slots, _SLOTS_STEP), _round_up(capacity, _CAPACITY_STEP)
        row_shape = (2, self._shape.kv_heads, self._shape.head_dim)
        # Should memory run out half-way, the next step resizes again rather than trust the rest.
        self._room = self.capacity = 0
        for index in range(self._shape.layers):
            # One layer at a time, so that old and new are never there in full together.
            new = torch.zeros(
                slots, capacity, *row_shape, device=self._device, dtype=self._shape.dtype
            )
            if index < len(self.tensors):
                old = self.tensors[index][:slots, :capacity]
                new[: old.size(0), : old.size(1)] = old
                self.tensors[index] = new
            else:
                self.tensors.append(new)
        self._room, self.capacity = slots, capacity

    def _bring_to_front(self, rows: Sequence[Row]) -> None:
        """Move the rows into the first slots, each of them at most once."""
        wanted = set(rows)
        free = [slot for slot in range(len(rows)) if self._rows[slot] not in wanted]
        for row in rows:
            if row.cache < len(rows):
                continue
            slot, source = free.pop(), row.cache
            other = self._rows[slot]
            if other is None:
                self._copy(source, slot, row.length)
            else:
                self._exchange(source, slot, max(row.length, other.length))
                other.cache = source
            self._rows[source], self._rows[slot] = other, row
            row.cache = slot

    def _copy(self, source: int, target: int, length: int) -> None:
        for tensor in self.tensors:
            tensor[target, :length] = tensor[source, :length]

    def _exchange(self, one: int, other: int, length: int) -> None:
        for tensor in self.tensors:
            kept = tensor[one, :length].clone()
            tensor[one, :length] = tensor[other, :length]
            tensor[other, :length] = kept


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step

"""Keys and values of all rows, one tensor for each layer.

All rows have room for the longest of them. The room changes only when more is needed, and becomes
then just what the rows of that moment need.

The rows of a step must lie side by side, so rows are moved when others leave; that copies one row,
while collecting rows from all over would copy every row in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS_STEP = 4
# One more, in which a new adapter reads its golden tokens beside the rows.
_SPARE_SLOTS = 1
_CAPACITY_STEP = 128


class KvCache:
    """Room for rows of a length; grows on demand and gives the memory back when it is empty.

    Args:
        layers: Number of layers.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        device: Where the tensors are.
        dtype: Of keys and values.

    Attributes:
        tensors: For each layer (slots, capacity, 2, kv_heads, head_dim).
        slots: Rows there is room for.
        capacity: Positions there are in each row.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        self._layers = layers
        self._row_shape = (2, kv_heads, head_dim)
        self._device = device
        self.tensors: list[Tensor] = []
        self.slots = 0
        self.capacity = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def slots_for(self, rows: int) -> int:
        """Return how many slots there are with room for so many rows."""
        return _round_up(rows, _SLOTS_STEP) + _SPARE_SLOTS

    def bytes_for(self, slots: int, capacity: int) -> int:
        """Return what a cache with room for so many rows of so many positions takes."""
        positions = self.slots_for(slots) * _round_up(capacity, _CAPACITY_STEP)
        return (
            self._layers
            * positions
            * 2
            * self._row_shape[1]
            * self._row_shape[2]
            * self._dtype.itemsize
        )

    def holds(self, slots: int, capacity: int) -> bool:
        """Tell whether there is room for so many rows of so many positions."""
        return slots <= self.slots and capacity <= self.capacity

    def resize(self, slots: int, capacity: int) -> None:
        """Have room for so many rows of so many positions and little more; these stay."""
        slots, capacity = self.slots_for(slots), _round_up(capacity, _CAPACITY_STEP)
        # Should memory run out half-way, the next step resizes again rather than trust the rest.
        self.slots = self.capacity = 0
        for index in range(self._layers):
            # One layer at a time, so that old and new are never there in full together.
            new = torch.zeros(
                slots, capacity, *self._row_shape, device=self._device, dtype=self._dtype
            )
            if index < len(self.tensors):
                old = self.tensors[index][:slots, :capacity]
                new[: old.size(0), : old.size(1)] = old
                self.tensors[index] = new
            else:
                self.tensors.append(new)
        self.slots, self.capacity = slots, capacity

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another."""
        for tensor in self.tensors:
            tensor[target, :length] = tensor[source, :length]

    def exchange(self, one: int, other: int, length: int) -> None:
        """Let two rows change places, as far as their first positions go."""
        for tensor in self.tensors:
            kept = tensor[one, :length].clone()
            tensor[one, :length] = tensor[other, :length]
            tensor[other, :length] = kept

    def empty_twin(self) -> KvCache:
        """Return a cache for rows of the same model, without room."""
        return KvCache(self._layers, *self._row_shape[1:], self._device, self._dtype)

    def clear(self) -> None:
        """Give all memory back."""
        self.tensors.clear()
        self.slots = self.capacity = 0


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step

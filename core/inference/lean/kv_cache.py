"""Keys and values of all rows, one tensor for each layer.

The rows of a step must lie side by side, so rows are moved when others leave; that copies one row,
while collecting rows from all over would copy every row in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS_STEP = 4
_CAPACITY_STEP = 128


class KvCache:
    """Room for rows of a length; grows on demand and gives the memory back when it is empty.

    Args:
        layers: Number of layers.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        device: Where the tensors are.

    Attributes:
        tensors: For each layer (slots, capacity, 2, kv_heads, head_dim), float32.
        slots: Rows there is room for.
        capacity: Positions there are in each row.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._layers = layers
        self._row_shape = (2, kv_heads, head_dim)
        self._device = device
        self.tensors: list[Tensor] = []
        self.slots = 0
        self.capacity = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return self.bytes_for(self.slots, self.capacity)

    def bytes_for(self, slots: int, capacity: int) -> int:
        """Return what a cache of this size takes."""
        numbers = 2 * self._row_shape[1] * self._row_shape[2]
        return self._layers * slots * capacity * numbers * 4

    def fit(self, slots: int, capacity: int) -> None:
        """Make room for at least so many rows of so many positions; what is there stays."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        slots = max(self.slots, _round_up(slots, _SLOTS_STEP))
        capacity = max(self.capacity, _round_up(capacity, _CAPACITY_STEP))
        for index in range(self._layers):
            # One layer at a time, so that old and new are never there in full together.
            grown = torch.zeros(slots, capacity, *self._row_shape, device=self._device)
            if self.tensors and index < len(self.tensors):
                grown[: self.slots, : self.capacity] = self.tensors[index]
                self.tensors[index] = grown
            else:
                self.tensors.append(grown)
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

    def clear(self) -> None:
        """Give all memory back."""
        self.tensors.clear()
        self.slots = self.capacity = 0


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step

"""Keys and values of prompts that were read, for prompts that begin in the same way.

Owns which blocks of tokens are kept and what that takes; what a block holds is the model's own
business. A block is found by a hash over everything that went into it: base model, adapter, project
and all tokens up to its end (Kwon et al., 2023). So a project never learns, not even by its speed,
what another one has asked. Knows no torch. Used from one thread only, except for `block_keys`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class _Block:
    base_digest: str
    content: Any
    bytes: int


class PrefixStore:
    """Blocks of prompts up to a size; the longest unused leave first.

    Args:
        max_bytes: Size of all blocks; 0 keeps none.

    Attributes:
        reused_tokens: Prompt tokens that had not to be computed again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.bytes = 0
        self.reused_tokens = 0

    def wants(self, key: bytes) -> bool:
        """Tell whether a block is worth being put."""
        return self._max_bytes > 0 and key not in self._blocks

    def find(self, keys: Sequence[bytes], first: int) -> list[Any]:
        """Return the contents of the blocks from `first` on, up to the first that is missing.

        Args:
            keys: Of all blocks of a prompt.
            first: Index of the first that is wanted.
        """
        end = first
        while end < len(keys) and keys[end] in self._blocks:
            end += 1
        if end > first:
            self._touch(keys[:end])
        return [self._blocks[key].content for key in keys[first:end]]

    def put(
        self,
        base_digest: str,
        keys: Sequence[bytes],
        index: int,
        content: Any,
        size: int,
    ) -> None:
        """Keep the block `index` of a prompt."""
        if size > self._max_bytes or keys[index] in self._blocks:
            return
        self._blocks[keys[index]] = _Block(base_digest, content, size)
        self.bytes += size
        # Blocks before it are newer, so that a chain is never broken in the middle.
        self._touch(keys[:index])
        while self.bytes > self._max_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].bytes

    def drop_base(self, base_digest: str) -> None:
        """Forget all blocks of a base model."""
        for key in [key for key, block in self._blocks.items() if block.base_digest == base_digest]:
            self.bytes -= self._blocks.pop(key).bytes

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)


def block_keys(
    token_ids: Sequence[int], *, base_digest: str, adapter_digest: str | None, project_id: str
) -> list[bytes]:
    """Return the keys of a prompt's whole blocks; its last token, always computed, is in none."""
    parts = (base_digest, adapter_digest or "", project_id)
    chain = hashlib.sha256("\n".join(parts).encode())
    keys = []
    for start in range(0, len(token_ids) - BLOCK_TOKENS, BLOCK_TOKENS):
        chain.update(array("q", token_ids[start : start + BLOCK_TOKENS]).tobytes())
        keys.append(chain.digest())
    return keys

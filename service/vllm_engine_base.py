"""Which of a vLLM server's models is the base model that a request means.

A server tells names and where it read from, but no digest. So either the files are where this
machine sees them, and are hashed here; or whoever started the server gave the digest as one of its
served names, and answers for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from core.artifacts import tree_digest
from core.errors import Conflict
from core.inference.engine import BaseModelRef
from service.vllm_engine_http import ModelCard

BASE_MODEL_NOT_SERVED = "base_model_not_served"

_Stamp = tuple[tuple[str, int, int], ...]


class ServedBases:
    """Finds base models among a server's models; used in one event loop.

    Digests of directories are kept as long as no file in them changes its size or time.
    """

    def __init__(self) -> None:
        self._hashing = asyncio.Lock()
        self._known: dict[str, tuple[_Stamp, str]] = {}
        self.found: dict[str, str] = {}

    async def find(self, cards: Sequence[ModelCard], wanted: BaseModelRef) -> ModelCard:
        """Return the server's model that has the base model's digest.

        Raises:
            Conflict: Code `base_model_not_served`; none is known to have it.
        """
        bases = [card for card in cards if card.parent is None]
        for card in bases:
            if wanted.digest in card.id or await self._digest(card.root) == wanted.digest:
                self.found = {wanted.digest: card.id}
                return card
        served = ", ".join(f"{card.id} from {card.root}" for card in bases) or "none"
        raise Conflict(
            f"the vLLM server does not serve the base model {wanted.name}, as far as can be told "
            f"(it serves {served})",
            code=BASE_MODEL_NOT_SERVED,
            hint=f"Start it with --model {wanted.path}; or, where it reads its own copy of these "
            f"files, with --served-model-name {wanted.digest}.",
        )

    async def _digest(self, root: str | None) -> str | None:
        if root is None:
            return None
        async with self._hashing:
            return await asyncio.to_thread(self._hash, root)

    def _hash(self, root: str) -> str | None:
        directory = Path(root)
        try:
            if not directory.is_absolute():
                return None
            stamp = tuple(
                sorted(
                    (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                    for entry in directory.iterdir()
                )
            )
            if self._known.get(root, ((), ""))[0] != stamp:
                self._known[root] = (stamp, tree_digest(directory))
        except OSError:
            return None
        return self._known[root][1]

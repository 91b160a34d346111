"""The decoder on torch, as TorchScript where that is to be had: for every device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.inference.lean.adapters import (
    ActiveBank,
    AdapterMatrices,
    LayerSizes,
    PlacedAdapter,
    arrange,
    bank_bytes,
)
from core.inference.lean.decoder import Batch, Decoder, Groups, LayerAdapters
from core.inference.lean.kv_cache import KvShape
from core.inference.lean.passes import Piece
from core.inference.lean.slot_cache import SlotCache
from core.logging import get_logger

# The scores are computed for whole blocks of positions, so that few different sizes occur.
_LENGTH_BLOCK = 32

log = get_logger(__name__)


class ScriptedDecoder:
    """Computes passes; see `core.inference.lean.passes.PassDecoder`.

    Rows with one token each are one pass, for which their adapters stand side by side in the bank.
    Longer pieces are computed one after the other.

    Args:
        decoder: The model.
        device: Where it is.
        compiled: Take the interpreter out of the pass where TorchScript can.
    """

    rows_are_independent = False

    def __init__(self, decoder: Decoder, device: torch.device, *, compiled: bool = True) -> None:
        self.weights = decoder
        self._decoder = _compile(decoder) if compiled else decoder
        self._device = device
        self._bank = ActiveBank()
        self._nothing = torch.zeros(0, dtype=torch.long, device=device)
        no_matrix = torch.zeros(0, 0, 0, device=device)
        self._no_adapters = [LayerAdapters(*(no_matrix for _ in LayerAdapters._fields))]
        self._no_groups = Groups(0, True, self._nothing, self._nothing, self._nothing)
        self._all_rows = Groups(1, True, self._nothing, self._nothing, self._nothing)

    def make_cache(self, layers: int, kv_heads: int, head_dim: int) -> SlotCache:
        """Return an empty cache."""
        return SlotCache(KvShape(layers, kv_heads, head_dim, torch.float32), self._device)

    def prepare(self, adapter: PlacedAdapter, sizes: LayerSizes) -> AdapterMatrices:
        """Return an adapter as the bank wants it; safe from any thread."""
        return AdapterMatrices(adapter, sizes, self._device)

    def bytes_beside(self, adapters: Sequence[AdapterMatrices]) -> int:
        """Return what the bank takes with these adapters side by side."""
        return bank_bytes(adapters)

    def forget(self, digest: str) -> None:
        """Note that an adapter is resident no longer."""
        self._bank.forget(digest)

    def compute(
        self, pieces: Sequence[Piece], cache: SlotCache, *, every_token: bool = False
    ) -> Tensor:
        """Return the logits after each piece, or after every token; see `PassDecoder`."""
        steps = [index for index, piece in enumerate(pieces) if len(piece.token_ids) == 1]
        logits: dict[int, Tensor] = {}
        if len(steps) > 1:
            # As views of one row each, which is what the others return, too.
            together = torch.split(self._step([pieces[index] for index in steps], cache), 1)
            logits.update(zip(steps, together, strict=True))
        for index, piece in enumerate(pieces):
            if index not in logits:
                logits[index] = self._read(piece, cache, every_token=every_token)
        return torch.cat([logits[index] for index in range(len(pieces))])

    def _step(self, pieces: Sequence[Piece], cache: SlotCache) -> Tensor:
        """Compute one token of each row in the first slots."""
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].place)
        sorted_pieces = [pieces[index] for index in order]
        digests, groups = arrange([piece.digest for piece in sorted_pieces])
        resident = {piece.digest: piece.adapter for piece in pieces if piece.digest is not None}
        starts = [piece.start for piece in sorted_pieces]
        positions = torch.tensor(starts, device=self._device)
        slots = torch.arange(len(pieces), device=self._device) * cache.capacity + positions
        logits: Tensor = self._run(
            torch.tensor([piece.token_ids[0] for piece in sorted_pieces], device=self._device),
            Batch(
                len(pieces),
                1,
                0,
                _seen_length(max(starts) + 1, cache),
                positions,
                slots,
                self._nothing,
            ),
            cache.tensors,
            self._bank.select(digests, resident) if digests else self._no_adapters,
            groups,
        )
        if order == list(range(len(pieces))):
            return logits
        back = sorted(range(len(order)), key=order.__getitem__)
        return logits[torch.tensor(back, device=self._device)]

    def _read(self, piece: Piece, cache: SlotCache, *, every_token: bool) -> Tensor:
        count = len(piece.token_ids)
        positions = torch.arange(piece.start, piece.start + count, device=self._device)
        slots = positions + piece.place * cache.capacity
        last = torch.tensor([count - 1], device=self._device)
        length = _seen_length(piece.start + count, cache)
        logits: Tensor = self._run(
            torch.tensor(list(piece.token_ids), device=self._device),
            Batch(
                1,
                count,
                piece.place,
                length,
                positions,
                slots,
                self._nothing if every_token else last,
            ),
            cache.tensors,
            piece.adapter.layers if piece.adapter else self._no_adapters,
            self._all_rows if piece.adapter else self._no_groups,
        )
        return logits

    def _run(self, *arguments: Any) -> Any:
        # Of each thread: see `_compile`.
        torch._C._set_graph_executor_optimize(False)
        return self._decoder(*arguments)


def _seen_length(longest: int, cache: SlotCache) -> int:
    return min(-(-longest // _LENGTH_BLOCK) * _LENGTH_BLOCK, cache.capacity)


def _compile(decoder: Decoder) -> Any:
    try:
        with warnings.catch_warnings():
            # torch announces a successor that takes a minute to compile this and is no faster.
            warnings.simplefilter("ignore")
            # Specialising the graph for every shape it meets would stop the first requests for
            # seconds and makes no step quicker.
            torch._C._set_graph_executor_optimize(False)
            return torch.jit.script(decoder)
    except Exception as error:
        log.warning("decoder_not_compiled", error=str(error).splitlines()[0])
        return decoder

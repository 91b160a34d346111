"""Rows and adapters of one base model on the lean decoder.

Owns which row has which slot of the cache and which adapters are resident. A step needs its rows in
the first slots; rows whose prompt is still being read stand behind them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from core.inference.gates import AdapterWeights
from core.inference.lean.adapters import (
    ActiveBank,
    AdapterMatrices,
    LayerNorms,
    arrange,
    bank_bytes,
)
from core.inference.lean.decoder import Batch, Decoder, Groups, LayerAdapters
from core.inference.lean.kv_cache import KvCache
from core.inference.lean.linear import Precision, linear_maker
from core.inference.lean.weights import build_decoder, shape_of
from core.inference.rows import Row
from core.logging import get_logger

# The scores are computed for whole blocks of positions, so that few different sizes occur.
_LENGTH_BLOCK = 32

log = get_logger(__name__)


class LeanModel:
    """Computes rows of any mixture of adapters in one step; see `core.inference.rows.RowModel`.

    Args:
        model: A model of transformers for which `why_not_lean` returns `None`, in float32 and on
            its device; it is not needed afterwards.
        precision: How the base weights are kept.
        compiled: Take the interpreter out of the step where TorchScript can.
    """

    def __init__(self, model: Any, precision: Precision, *, compiled: bool = True) -> None:
        self.precision = precision
        self._device: torch.device = model.device
        self._shape = shape_of(model)
        decoder = build_decoder(model, linear_maker(precision, self._device))
        self._weight_bytes = _weight_bytes(model, precision)
        self._decoder = _compile(decoder) if compiled else decoder
        layers = model.model.layers
        self._norms = [
            LayerNorms(
                layer.input_layernorm.weight.detach().float().clone(),
                layer.post_attention_layernorm.weight.detach().float().clone(),
            )
            for layer in layers
        ]
        self._widths = _widths(layers[0])
        self._cache = KvCache(len(layers), self._shape.kv_heads, self._shape.head_dim, self._device)
        self._slots: list[Row | None] = []
        self._resident: dict[str, AdapterMatrices] = {}
        self._bank = ActiveBank()
        self._nothing = torch.zeros(0, dtype=torch.long, device=self._device)
        no_matrix = torch.zeros(0, 0, 0, device=self._device)
        self._no_adapters = [LayerAdapters(*(no_matrix for _ in LayerAdapters._fields))]
        self._no_groups = Groups(0, True, self._nothing, self._nothing, self._nothing)
        self._all_rows = Groups(1, True, self._nothing, self._nothing, self._nothing)

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value cache at present."""
        return self._cache.bytes

    @property
    def weight_bytes(self) -> int:
        """What the base weights take."""
        return self._weight_bytes

    def bytes_for(self, lengths: Sequence[int], adapters: Collection[str]) -> int:
        """Return what rows of these lengths take, and their adapters side by side."""
        cache = self._cache.bytes_for(len(lengths), max(lengths, default=0))
        return cache + bank_bytes([self._resident[digest] for digest in adapters])

    def prepare(self, weights: AdapterWeights) -> AdapterMatrices:
        """Return an adapter's matrices as the decoder wants them; safe from any thread."""
        return AdapterMatrices(weights, self._norms, self._shape, self._widths, self._device)

    def insert(self, digest: str, prepared: AdapterMatrices) -> set[str]:
        """Make an adapter resident; return the names of the modules that it changes."""
        self._resident[digest] = prepared
        return prepared.applied

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        self._resident.pop(digest, None)
        self._bank.forget(digest)
        if not self._resident:
            self._bank.clear()

    def open_row(self, adapter: str | None, prompt_ids: list[int]) -> Row:
        """Return a row of which nothing is computed yet; see `RowModel`."""
        return Row(adapter, prompt_ids)

    @torch.inference_mode()
    def prefill(self, row: Row, max_tokens: int) -> Tensor | None:
        """Compute the next piece of a prompt; see `RowModel`."""
        if row.cache is None:
            self._take_slot(row)
        piece = row.prompt_ids[row.length : row.length + max_tokens]
        self._fit(row.length + len(piece))
        logits = self._compute_piece(row, piece, self._cache, last_only=True)
        row.length += len(piece)
        return logits[0] if row.prefilled else None

    @torch.inference_mode()
    def fork(self, row: Row) -> Row:
        """Return another row with the same text; see `RowModel`."""
        twin = Row(row.adapter, row.prompt_ids, row.length)
        self._take_slot(twin)
        self._cache.copy(row.cache, twin.cache, row.length)
        return twin

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], token_ids: Sequence[int]) -> Tensor:
        """Append a token to each row; see `RowModel`."""
        longest = max(row.length for row in rows) + 1
        self._fit(longest)
        self._bring_to_front(rows)
        order = sorted(range(len(rows)), key=lambda index: int(rows[index].cache))
        adapters, groups = arrange([rows[index].adapter for index in order])
        positions = torch.tensor([rows[index].length for index in order], device=self._device)
        slots = torch.arange(len(rows), device=self._device) * self._cache.capacity + positions
        logits: Tensor = self._run(
            torch.tensor([token_ids[index] for index in order], device=self._device),
            Batch(
                len(rows), 1, 0, _seen_length(longest, self._cache), positions, slots, self._nothing
            ),
            self._cache.tensors,
            self._bank.select(adapters, self._resident) if adapters else self._no_adapters,
            groups,
        )
        for row in rows:
            row.length += 1
        if order == list(range(len(rows))):
            return logits
        back = sorted(range(len(order)), key=order.__getitem__)
        return logits[torch.tensor(back, device=self._device)]

    def close_row(self, row: Row) -> None:
        """Forget a row; see `RowModel`."""
        if row.cache is None:
            return
        self._slots[row.cache] = None
        row.cache = None
        while self._slots and self._slots[-1] is None:
            self._slots.pop()
        if not self._slots:
            self._cache.clear()

    @torch.inference_mode()
    def logits_of(self, adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text by itself, (tokens, vocabulary)."""
        # In a cache of its own: it is no request, and shall not take memory from any.
        apart = self._cache.empty_twin()
        apart.resize(1, len(token_ids))
        row = Row(adapter, list(token_ids), cache=0)
        return self._compute_piece(row, row.prompt_ids, apart, last_only=False)

    def read_cache(self, row: Row, start: int, end: int) -> Tensor:
        """Return a copy of a part of the cache; see `RowModel`."""
        if row.cache is None:
            raise RuntimeError("the row has nothing in the cache")
        return torch.stack([tensor[row.cache, start:end] for tensor in self._cache.tensors])

    @torch.inference_mode()
    def write_cache(self, row: Row, start: int, blocks: Sequence[Tensor]) -> None:
        """Give a row a part of the cache; see `RowModel`."""
        if row.cache is None:
            self._take_slot(row)
        content = torch.cat(list(blocks), dim=1)
        end = start + content.size(1)
        self._fit(end)
        for tensor, part in zip(self._cache.tensors, content, strict=True):
            tensor[row.cache, start:end] = part
        row.length = end

    def _compute_piece(
        self, row: Row, token_ids: list[int], cache: KvCache, *, last_only: bool
    ) -> Tensor:
        count = len(token_ids)
        positions = torch.arange(row.length, row.length + count, device=self._device)
        slots = positions + row.cache * cache.capacity
        keep = torch.tensor([count - 1], device=self._device) if last_only else self._nothing
        length = _seen_length(row.length + count, cache)
        adapter = self._resident[row.adapter].layers if row.adapter else self._no_adapters
        logits: Tensor = self._run(
            torch.tensor(token_ids, device=self._device),
            Batch(1, count, row.cache, length, positions, slots, keep),
            cache.tensors,
            adapter,
            self._all_rows if row.adapter else self._no_groups,
        )
        return logits

    def _run(self, *arguments: Any) -> Any:
        # Of each thread: see `_compile`.
        torch._C._set_graph_executor_optimize(False)
        return self._decoder(*arguments)

    def _fit(self, longest: int) -> None:
        """Have room for all rows there are, and for `longest` positions in each."""
        if self._cache.holds(len(self._slots), longest):
            return
        self._close_gaps()
        lengths = [row.length for row in self._slots if row is not None]
        self._cache.resize(len(self._slots), max(longest, *lengths))

    def _close_gaps(self) -> None:
        """Move rows from behind to where others have left, so that no room is taken for those."""
        while None in self._slots:
            row = self._slots.pop()
            if row is not None:
                slot = self._slots.index(None)
                self._cache.copy(row.cache, slot, row.length)
                self._slots[slot], row.cache = row, slot

    def _take_slot(self, row: Row) -> None:
        if None in self._slots:
            row.cache = self._slots.index(None)
            self._slots[row.cache] = row
        else:
            row.cache = len(self._slots)
            self._slots.append(row)
        self._fit(row.length + 1)

    def _bring_to_front(self, rows: Sequence[Row]) -> None:
        """Move the rows into the first slots, each of them at most once."""
        wanted = set(rows)
        free = [slot for slot in range(len(rows)) if self._slots[slot] not in wanted]
        for row in rows:
            if row.cache < len(rows):
                continue
            slot, source = free.pop(), row.cache
            other = self._slots[slot]
            if other is None:
                self._cache.copy(source, slot, row.length)
            else:
                self._cache.exchange(source, slot, max(row.length, other.length))
                other.cache = source
            self._slots[source], self._slots[slot] = other, row
            row.cache = slot


def _seen_length(longest: int, cache: KvCache) -> int:
    return min(-(-longest // _LENGTH_BLOCK) * _LENGTH_BLOCK, cache.capacity)


def _weight_bytes(model: Any, precision: Precision) -> int:
    """Return what the decoder makes of a model; the embedding stays in float32."""
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    products = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding)
    return 4 * int(embedding) + (4 if precision == "float32" else 2) * int(products)


def _widths(layer: Any) -> dict[str, tuple[int, int]]:
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    return {
        name.removesuffix("_proj"): (module.in_features, module.out_features)
        for name, module in modules.items()
        if name.endswith("_proj")
    }


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

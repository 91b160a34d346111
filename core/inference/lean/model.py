"""Rows and adapters of one base model on the lean decoder.

Owns which adapters are resident. A decoder computes the passes, `native` where it can, `scripted`
everywhere else, with keys and values in a cache of its own kind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from core.inference.gates import AdapterWeights
from core.inference.lean.adapters import LayerNorms, LayerSizes, place
from core.inference.lean.kv_cache import KvCache
from core.inference.lean.linear import Precision, linear_maker
from core.inference.lean.native import NativeDecoder, why_not_native
from core.inference.lean.panels import Arena, PanelLinear
from core.inference.lean.passes import PassDecoder, Piece
from core.inference.lean.scripted import ScriptedDecoder
from core.inference.lean.weights import build_decoder, shape_of
from core.inference.rows import Row
from core.logging import get_logger

Path = Literal["auto", "native", "scripted", "eager"]

_CHUNK_BYTES = 64 * 2**20

log = get_logger(__name__)


@dataclass(frozen=True)
class LeanAdapter:
    """An adapter as the model keeps it.

    Attributes:
        own: What its decoder made of it.
        applied: The modules that the decoder computes with it.
    """

    own: Any
    applied: set[str]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return int(self.own.bytes)


class LeanModel:
    """Computes rows of any mixture of adapters in one pass; see `core.inference.rows.RowModel`.

    Args:
        model: A model of transformers for which `why_not_lean` returns `None`, in float32 and on
            its device; it is not needed afterwards.
        precision: How the base weights are kept.
        path: `auto` is the fastest decoder that can compute the model here, `eager` the slowest.
    """

    reads_whole_prompts = False

    def __init__(self, model: Any, precision: Precision, *, path: Path = "auto") -> None:
        self.precision = precision
        self._device: torch.device = model.device
        shape = shape_of(model)
        self._decoder = _make_decoder(model, precision, path)
        self._weight_bytes = _weight_bytes(model, precision)
        layers = model.model.layers
        norms = [
            LayerNorms(
                layer.input_layernorm.weight.detach().float().clone(),
                layer.post_attention_layernorm.weight.detach().float().clone(),
            )
            for layer in layers
        ]
        self._sizes = LayerSizes(shape, _widths(layers[0]), norms)
        self._make_cache = partial(
            self._decoder.make_cache, len(layers), shape.kv_heads, shape.head_dim
        )
        self._cache: KvCache = self._make_cache()
        self._resident: dict[str, LeanAdapter] = {}

    @property
    def cache_bytes(self) -> int:
        """Size of the key-value cache at present."""
        return self._cache.bytes

    @property
    def weight_bytes(self) -> int:
        """What the base weights take."""
        return self._weight_bytes

    @property
    def rows_are_independent(self) -> bool:
        """Whether neighbours leave a row's logits as they are; see `RowModel`."""
        return self._decoder.rows_are_independent

    def bytes_for(self, lengths: Sequence[int], adapters: Collection[str]) -> int:
        """Return what rows of these lengths take, and their adapters side by side."""
        return self._cache.bytes_for(lengths) + self._decoder.bytes_beside(
            [self._resident[d].own for d in adapters]
        )

    def prepare(self, weights: AdapterWeights) -> LeanAdapter:
        """Return an adapter's matrices as the decoder wants them; safe from any thread."""
        placed = place(weights, self._sizes)
        return LeanAdapter(self._decoder.prepare(placed, self._sizes), placed.applied)

    def insert(self, digest: str, prepared: LeanAdapter) -> set[str]:
        """Make an adapter resident; return the names of the modules that it changes."""
        self._resident[digest] = prepared
        return prepared.applied

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        if self._resident.pop(digest, None) is not None:
            self._decoder.forget(digest)

    def open_row(self, adapter: str | None, prompt_ids: list[int]) -> Row:
        """Return a row of which nothing is computed yet; see `RowModel`."""
        return Row(adapter, prompt_ids)

    @torch.inference_mode()
    def extend(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row; see `RowModel`."""
        self._cache.make_room(rows, [len(piece) for piece in pieces])
        logits = self._decoder.compute(
            [self._piece(row, piece) for row, piece in zip(rows, pieces, strict=True)], self._cache
        )
        for row, piece in zip(rows, pieces, strict=True):
            row.length += len(piece)
        return logits

    @torch.inference_mode()
    def fork(self, row: Row) -> Row:
        """Return another row with the same text; see `RowModel`."""
        twin = Row(row.adapter, row.prompt_ids, row.length)
        try:
            self._cache.fork(row, twin)
        except BaseException:
            # Memory may run out half-way, and nobody else knows of the twin.
            self.close_row(twin)
            raise
        return twin

    def close_row(self, row: Row) -> None:
        """Forget a row; see `RowModel`."""
        if row.cache is not None:
            self._cache.release(row)

    @torch.inference_mode()
    def logits_of(self, adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text by itself, (tokens, vocabulary)."""
        # In a cache of its own: it is no request, and shall not take memory from any.
        apart = self._make_cache()
        row = Row(adapter, list(token_ids))
        apart.make_room([row], [len(token_ids)])
        return self._decoder.compute([self._piece(row, token_ids)], apart, every_token=True)

    def read_cache(self, row: Row, start: int, end: int) -> Tensor:
        """Return a copy of a part of the cache; see `RowModel`."""
        if row.cache is None:
            raise RuntimeError("the row has nothing in the cache")
        return self._cache.read(row, start, end)

    @torch.inference_mode()
    def write_cache(self, row: Row, start: int, blocks: Sequence[Tensor]) -> None:
        """Give a row a part of the cache; see `RowModel`."""
        content = torch.cat(list(blocks), dim=1)
        end = start + content.size(1)
        self._cache.make_room([row], [end - row.length])
        self._cache.write(row, start, content)
        row.length = end

    def _piece(self, row: Row, token_ids: Sequence[int]) -> Piece:
        adapter = self._resident[row.adapter].own if row.adapter else None
        return Piece(row.cache, row.length, token_ids, row.adapter, adapter)


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


def _make_decoder(model: Any, precision: Precision, path: Path) -> PassDecoder:
    device: torch.device = model.device
    if path in ("auto", "native"):
        reason = why_not_native(model, precision)
        if reason is None:
            half = precision == "fp16"
            linear = partial(PanelLinear, half=half, arena=Arena(_CHUNK_BYTES))
            decoder = build_decoder(model, linear)
            return NativeDecoder(decoder, shape_of(model), precision, torch.get_num_threads())
        log.info("decoder_is_not_native", reason=reason)
        if path == "native":
            raise ValueError(reason)
    decoder = build_decoder(model, linear_maker(precision, device))
    return ScriptedDecoder(decoder, device, compiled=path != "eager")

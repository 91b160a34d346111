"""Rows of any model that transformers loads, computed one after the other with PEFT.

The slow path beside the lean decoder: correct for every causal language model, and the only one
that knows modules outside the Llama family.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from core.inference.gates import AdapterWeights, LoraMatrices
from core.inference.rows import Row


class PeftRows:
    """Computes rows by transformers' own forward; see `core.inference.rows.RowModel`.

    Every pass names its adapter, and every layer is told before it computes.

    Args:
        model: In evaluation mode, without gradients, untouched by PEFT.
    """

    precision = "float32"

    def __init__(self, model: Any) -> None:
        self.model = model
        self._device: torch.device = model.device
        self._tuner: Any = None
        self._layers: list[Any] = []
        self._caches: dict[int, Any] = {}
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        self._token_bytes: int = 2 * 4 * config.num_hidden_layers * heads * width

    @property
    def cache_bytes(self) -> int:
        """Size of the keys and values of all open rows."""
        return sum(_cache_bytes(cache) for cache in self._caches.values())

    @property
    def weight_bytes(self) -> int:
        """What the base weights take."""
        own = {p.data_ptr(): p.nbytes for n, p in self.model.named_parameters() if "lora_" not in n}
        return sum(own.values())

    def bytes_for(self, lengths: Sequence[int], adapters: Collection[str]) -> int:
        """Return what rows of these lengths take; an adapter's matrices are used where they are."""
        return sum(lengths) * self._token_bytes

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """Return an adapter as it is; PEFT does everything when it is inserted."""
        return weights

    def insert(self, digest: str, prepared: AdapterWeights) -> set[str]:
        """Make an adapter resident; return the names of the modules that it changes."""
        weights = prepared
        config = LoraConfig(
            r=weights.r,
            lora_alpha=weights.lora_alpha,
            use_rslora=weights.use_rslora,
            target_modules=sorted(weights.modules),
            lora_dropout=0.0,
            bias="none",
            init_lora_weights=False,
            inference_mode=True,
        )
        try:
            if self._tuner is None:
                self._tuner = LoraModel(self.model, config, weights.digest)
            else:
                self._tuner.peft_config[weights.digest] = config
                # PEFT looks up the config of what it believes active, which may have been removed.
                self._tuner.active_adapter = weights.digest
                self._tuner.inject_adapter(self.model, weights.digest)
        finally:
            self._layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        applied = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and weights.digest in module.lora_A
        }
        _copy_matrices(applied, weights.digest, weights.modules)
        self.model.eval()
        return set(applied)

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        self._activate([])
        for layer in self._layers:
            layer.delete_adapter(digest)
        if self._tuner is not None:
            self._tuner.peft_config.pop(digest, None)

    def logits_of(self, adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        """Return the logits of every position of a text by itself, (tokens, vocabulary)."""
        return self._forward(adapter, token_ids, cache=None, logits_to_keep=0)

    def open_row(self, adapter: str | None, prompt_ids: list[int]) -> Row:
        """Return a row of which nothing is computed yet; see `RowModel`."""
        return Row(adapter, prompt_ids)

    def prefill(self, row: Row, max_tokens: int) -> Tensor | None:
        """Compute the next piece of a prompt; see `RowModel`."""
        cache = self._cache_of(row)
        piece = row.prompt_ids[row.length : row.length + max_tokens]
        logits = self._forward(row.adapter, piece, cache=cache, logits_to_keep=1)
        row.length += len(piece)
        return logits[-1] if row.prefilled else None

    def fork(self, row: Row) -> Row:
        """Return another row with the same text; see `RowModel`."""
        twin = Row(row.adapter, row.prompt_ids, row.length, copy.deepcopy(row.cache))
        self._caches[id(twin)] = twin.cache
        return twin

    def decode(self, rows: Sequence[Row], token_ids: Sequence[int]) -> Tensor:
        """Append a token to each row; see `RowModel`."""
        logits = []
        for row, token_id in zip(rows, token_ids, strict=True):
            if (surplus := row.cache.get_seq_length() - row.length) > 0:
                # An earlier pass over these rows failed at one behind this one.
                row.cache.crop(-surplus)
            logits.append(
                self._forward(row.adapter, [token_id], cache=row.cache, logits_to_keep=1)[-1]
            )
        for row in rows:
            row.length += 1
        return torch.stack(logits).float()

    def close_row(self, row: Row) -> None:
        """Forget a row; see `RowModel`."""
        if row.cache is not None:
            row.cache = None
            del self._caches[id(row)]

    def read_cache(self, row: Row, start: int, end: int) -> Tensor | None:
        """Return a copy of a part of the cache; see `RowModel`."""
        from transformers.cache_utils import DynamicLayer

        layers = row.cache.layers
        # Others forget or sum up what they have seen.
        if any(type(layer) is not DynamicLayer for layer in layers):
            return None
        if len({layer.keys.shape for layer in layers} | {x.values.shape for x in layers}) > 1:
            return None
        parts = [
            torch.stack([layer.keys[0, :, start:end], layer.values[0, :, start:end]])
            for layer in layers
        ]
        # (layers, 2, heads, tokens, width) → (layers, tokens, 2, heads, width)
        return torch.stack(parts).permute(0, 3, 1, 2, 4).contiguous()

    @torch.inference_mode()
    def write_cache(self, row: Row, start: int, blocks: Sequence[Tensor]) -> None:
        """Give a row a part of the cache; see `RowModel`."""
        cache = self._cache_of(row)
        if (surplus := cache.get_seq_length() - start) > 0:
            cache.crop(-surplus)
        content = torch.cat(list(blocks), dim=1).permute(0, 2, 3, 1, 4)
        for index, (keys, values) in enumerate(content):
            cache.update(keys.unsqueeze(0), values.unsqueeze(0), index)
        row.length = start + content.size(3)

    def _cache_of(self, row: Row) -> Any:
        if row.cache is None:
            from transformers import DynamicCache

            row.cache = DynamicCache(config=self.model.config)
            self._caches[id(row)] = row.cache
        return row.cache

    @torch.inference_mode()
    def _forward(
        self, adapter: str | None, token_ids: Sequence[int], *, cache: Any, logits_to_keep: int
    ) -> Tensor:
        self._activate([] if adapter is None else [adapter])
        output = self.model(
            input_ids=torch.tensor([list(token_ids)], device=self._device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _activate(self, adapters: list[str]) -> None:
        """Make every layer use these adapters; layers without them compute with base weights."""
        for layer in self._layers:
            # What LoraLayer.set_adapter does, without its walk over all matrices for the sake of
            # gradients, which takes as long as a quarter of a decoding step.
            layer._active_adapter = adapters
            if layer.active_adapters != adapters or layer.merged or layer.disable_adapters:
                raise RuntimeError("an adapter layer did not accept the choice of the adapter")


def _cache_bytes(cache: Any) -> int:
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def _copy_matrices(
    applied: Mapping[str, Any], digest: str, matrices: Mapping[str, LoraMatrices]
) -> None:
    for name, layer in applied.items():
        if name in matrices:
            layer.lora_A[digest].weight.copy_(matrices[name].a)
            layer.lora_B[digest].weight.copy_(matrices[name].b)

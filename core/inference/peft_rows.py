"""Rows of any model that transformers loads, computed one after the other with PEFT.

The slow path beside the lean decoder: correct for every causal language model, and the only one
that knows modules outside the Llama family. A model whose state sums up what it has seen reads a
prompt in one piece, since few of them go on rightly from the middle of one; a model that takes no
cache computes the whole text for each token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from core.inference.gates import AdapterWeights, LoraMatrices
from core.inference.rows import Row

# What models call the cache that they take.
_CACHE_NAMES = ("past_key_values", "cache_params")


class PeftRows:
    """Computes rows by transformers' own forward; see `core.inference.rows.RowModel`.

    Every pass names its adapter, and every layer is told before it computes.

    Args:
        model: In evaluation mode, without gradients, untouched by PEFT.
    """

    precision = "float32"
    # Rows are computed one by one, but a text in pieces is not computed as one in one piece.
    rows_are_independent = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self._device: torch.device = model.device
        self._tuner: Any = None
        self._layers: list[Any] = []
        self._caches: dict[int, Any] = {}
        # Rows that an earlier pass has computed before it failed at another one, and those others.
        self._ahead: dict[Row, Tensor] = {}
        self._broken: dict[Row, Exception] = {}
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in parameters), None)
        self._keeps_logits = "logits_to_keep" in parameters
        self._token_bytes = _token_bytes(model.config.get_text_config())
        self._state_bytes = self._measure_state()

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
        return sum(lengths) * self._token_bytes + len(lengths) * self._state_bytes

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

    @property
    def reads_whole_prompts(self) -> bool:
        """Whether rows keep more than keys and values, which pieces might get wrong."""
        return bool(self._state_bytes)

    def extend(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row, one row after the other; see `RowModel`."""
        pairs = list(zip(rows, pieces, strict=True))
        logits = [self._compute_next(row, piece) for row, piece in pairs]
        for row, piece in pairs:
            del self._ahead[row]
            row.length += len(piece)
        return torch.stack(logits).float()

    def fork(self, row: Row) -> Row:
        """Return another row with the same text; see `RowModel`."""
        twin = Row(row.adapter, row.prompt_ids, row.length, copy.deepcopy(row.cache))
        self._caches[id(twin)] = twin.cache
        return twin

    def close_row(self, row: Row) -> None:
        """Forget a row; see `RowModel`."""
        self._ahead.pop(row, None)
        self._broken.pop(row, None)
        if row.cache is not None:
            row.cache = None
            del self._caches[id(row)]

    def read_cache(self, row: Row, start: int, end: int) -> Tensor | None:
        """Return a copy of a part of the cache; see `RowModel`."""
        from transformers.cache_utils import DynamicLayer

        if self._cache_name is None:
            return None
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

    def _compute_next(self, row: Row, piece: Sequence[int]) -> Tensor:
        """Return the logits after a piece, computed once however often a pass is repeated."""
        if row in self._broken:
            # Nobody knows how many layers had taken the tokens into the cache.
            raise self._broken[row]
        if row not in self._ahead:
            try:
                cache = self._cache_of(row)
                logits = self._forward(row.adapter, piece, cache=cache, logits_to_keep=1)
            except Exception as error:
                self._broken[row] = error
                raise
            self._ahead[row] = logits[-1]
        return self._ahead[row]

    def _cache_of(self, row: Row) -> Any:
        if row.cache is None:
            row.cache = self._new_cache()
            self._caches[id(row)] = row.cache
        return row.cache

    def _new_cache(self) -> Any:
        """Return an empty cache; of a model that takes none, the text itself."""
        from transformers import DynamicCache

        return [] if self._cache_name is None else DynamicCache(config=self.model.config)

    def _measure_state(self) -> int:
        """Return what a row takes however long it is; 0 where the cache is keys and values only."""
        if self._cache_name is None:
            return 0
        cache = self._new_cache()
        self._forward(None, [0], cache=cache, logits_to_keep=1)
        return sum(tensor.nbytes for tensor in _states(cache))

    @torch.inference_mode()
    def _forward(
        self, adapter: str | None, token_ids: Sequence[int], *, cache: Any, logits_to_keep: int
    ) -> Tensor:
        self._activate([] if adapter is None else [adapter])
        text = isinstance(cache, list)
        ids = [*cache, *token_ids] if text else list(token_ids)
        options: dict[str, Any] = {"use_cache": cache is not None and not text}
        if options["use_cache"]:
            options[str(self._cache_name)] = cache
        if self._keeps_logits:
            options["logits_to_keep"] = logits_to_keep
        output = self.model(input_ids=torch.tensor([ids], device=self._device), **options)
        if text:
            cache.extend(token_ids)
        logits: Tensor = output.logits[0]
        return logits[-logits_to_keep:]

    def _activate(self, adapters: list[str]) -> None:
        """Make every layer use these adapters; layers without them compute with base weights."""
        for layer in self._layers:
            # What LoraLayer.set_adapter does, without its walk over all matrices for the sake of
            # gradients, which takes as long as a quarter of a decoding step.
            layer._active_adapter = adapters
            if layer.active_adapters != adapters or layer.merged or layer.disable_adapters:
                raise RuntimeError("an adapter layer did not accept the choice of the adapter")


def _token_bytes(config: Any) -> int:
    """Return what the keys and values of a token take at most; 0 without attention."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * 4 * config.num_hidden_layers * heads * width)


def _cache_bytes(cache: Any) -> int:
    if isinstance(cache, list):
        return 0
    keys_and_values = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return sum(tensor.nbytes for tensor in (*keys_and_values, *_states(cache)))


def _states(cache: Any) -> Iterator[Tensor]:
    """Yield what layers keep of a text besides keys and values."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, None) or {}
            yield from (state for state in states.values() if state is not None)


@torch.no_grad()
def _copy_matrices(
    applied: Mapping[str, Any], digest: str, matrices: Mapping[str, LoraMatrices]
) -> None:
    for name, layer in applied.items():
        if name in matrices:
            layer.lora_A[digest].weight.copy_(matrices[name].a)
            layer.lora_B[digest].weight.copy_(matrices[name].b)

"""Rows of any model that transformers loads, computed one after the other with PEFT.

The slow path beside the lean decoder: correct for every causal language model, and the only one
that knows modules outside the Llama family.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
        self._open = 0

    @property
    def cache_bytes(self) -> int:
        """Unknown: each row's cache grows by itself; 0 when no row is open."""
        return self._open

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
        if row.cache is None:
            from transformers import DynamicCache

            row.cache = DynamicCache(config=self.model.config)
            self._open += 1
        piece = row.prompt_ids[row.length : row.length + max_tokens]
        logits = self._forward(row.adapter, piece, cache=row.cache, logits_to_keep=1)
        row.length += len(piece)
        return logits[-1] if row.prefilled else None

    def fork(self, row: Row) -> Row:
        """Return another row with the same text; see `RowModel`."""
        self._open += 1
        return Row(row.adapter, row.prompt_ids, row.length, copy.deepcopy(row.cache))

    def decode(self, rows: Sequence[Row], token_ids: Sequence[int]) -> Tensor:
        """Append a token to each row; see `RowModel`."""
        logits = []
        for row, token_id in zip(rows, token_ids, strict=True):
            if row.cache.get_seq_length() > row.length:
                # An earlier pass over these rows failed at one behind this one.
                row.cache.crop(row.length)
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
            self._open -= 1

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


@torch.no_grad()
def _copy_matrices(
    applied: Mapping[str, Any], digest: str, matrices: Mapping[str, LoraMatrices]
) -> None:
    for name, layer in applied.items():
        if name in matrices:
            layer.lora_A[digest].weight.copy_(matrices[name].a)
            layer.lora_B[digest].weight.copy_(matrices[name].b)

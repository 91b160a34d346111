"""A base model in memory, and the adapters injected into it.

Owns the weights and the one way to compute with them: `forward`, which names the adapter of every
single pass. Used from the engine thread only, except for what its docstrings say otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from core.inference.decoding import Decoding
from core.inference.engine import SamplingParams
from core.inference.gates import (
    AdapterWeights,
    BaseFacts,
    LoraMatrices,
    check_applied,
    check_effect,
)
from core.inference.prompts import PromptEncoder
from core.inference.sampling import RowSampler

# Enough positions to see an effect; more would only take time from running requests.
_MAX_GOLDEN_TOKENS = 64


class LoadedBase:
    """One base model with its adapters.

    Args:
        model: In evaluation mode, without gradients, untouched by PEFT.
        tokenizer: Its tokenizer.
        facts: What adapters are matched against.
        eos_ids: Tokens that end an answer.
        context_length: Tokens that prompt and answer may have together.
    """

    precision = "float32"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        facts: BaseFacts,
        eos_ids: frozenset[int],
        context_length: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts
        self.eos_ids = eos_ids
        self._context_length = context_length
        self._device: torch.device = model.device
        self._tuner: Any = None
        self._layers: list[Any] = []
        self._encoders: dict[str | None, PromptEncoder] = {
            None: PromptEncoder(tokenizer, context_length)
        }
        self._golden: tuple[tuple[int, ...], Tensor] | None = None

    def encoder(self, adapter: str | None) -> PromptEncoder:
        """Return the prompt encoder of an injected adapter, or of the base model itself."""
        return self._encoders[adapter]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out; safe from any thread."""
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def token_text(self, token_id: int) -> str:
        """Return one token's own text; safe from any thread."""
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def start(
        self, adapter: str | None, prompt_ids: list[int], sampling: SamplingParams
    ) -> Decoding:
        """Return the decoding of a prompt with an injected adapter, or with the base model."""
        from transformers import DynamicCache

        def forward(input_ids: Tensor, cache: Any) -> Tensor:
            return self.forward(adapter, input_ids, cache=cache, logits_to_keep=1)[:, -1]

        samplers = [
            RowSampler(sampling, row, prompt_ids, self.eos_ids) for row in range(sampling.n)
        ]
        cache = DynamicCache(config=self.model.config)
        return Decoding(forward, cache, prompt_ids, samplers, self._device)

    @torch.inference_mode()
    def forward(
        self,
        adapter: str | None,
        input_ids: Tensor,
        *,
        cache: Any = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Compute logits with exactly the named adapter, or with the base weights alone.

        Args:
            adapter: Digest of an injected adapter, or `None`.
            input_ids: Shape (rows, tokens).
            cache: Extended in place.
            logits_to_keep: Only so many last positions; 0 keeps all.

        Returns:
            Logits of shape (rows, positions, vocabulary).
        """
        self._activate([] if adapter is None else [adapter])
        output = self.model(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits
        return logits

    def insert(self, weights: AdapterWeights) -> None:
        """Inject an adapter, through the gates that need the model; on refusal nothing stays.

        Raises:
            Conflict: Code `adapter_not_applied`, `adapter_not_finite` or `adapter_has_no_effect`.
        """
        try:
            self._inject(weights)
            self._check_effect(weights)
        except BaseException:
            self.remove(weights.digest)
            raise
        # The tokenizer is the base's own, byte for byte; only the template is the adapter's.
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = weights.template
        self._encoders[weights.digest] = PromptEncoder(tokenizer, self._context_length)

    def remove(self, digest: str) -> None:
        """Take an adapter out of the model; a no-op for one that is not there."""
        self._activate([])
        for layer in self._layers:
            layer.delete_adapter(digest)
        if self._tuner is not None:
            self._tuner.peft_config.pop(digest, None)
        self._encoders.pop(digest, None)

    def applied_modules(self, digest: str) -> dict[str, Any]:
        """Return the modules that hold matrices of an adapter, by name."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and digest in module.lora_A
        }

    def _activate(self, adapters: list[str]) -> None:
        """Make every layer use these adapters; layers without them compute with base weights."""
        for layer in self._layers:
            # What LoraLayer.set_adapter does, without its walk over all matrices for the sake of
            # gradients, which takes as long as a quarter of a decoding step.
            layer._active_adapter = adapters
            if layer.active_adapters != adapters or layer.merged or layer.disable_adapters:
                raise RuntimeError("an adapter layer did not accept the choice of the adapter")

    def _inject(self, weights: AdapterWeights) -> None:
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
        applied = self.applied_modules(weights.digest)
        check_applied(applied, weights.modules)
        _copy_matrices(applied, weights.digest, weights.modules)
        self.model.eval()

    def _check_effect(self, weights: AdapterWeights) -> None:
        ids = tuple(weights.golden_token_ids[:_MAX_GOLDEN_TOKENS])
        golden = torch.tensor([ids], device=self._device)
        if self._golden is None or self._golden[0] != ids:
            self._golden = (ids, self.forward(None, golden))
        check_effect(self._golden[1], self.forward(weights.digest, golden))


@torch.no_grad()
def _copy_matrices(
    applied: Mapping[str, Any], digest: str, matrices: Mapping[str, LoraMatrices]
) -> None:
    for name, layer in applied.items():
        layer.lora_A[digest].weight.copy_(matrices[name].a)
        layer.lora_B[digest].weight.copy_(matrices[name].b)

"""Tiny random models of many architectures, saved with a tokenizer as base models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tests.support.tiny_model import make_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
# By name: the architecture and what its config has besides.
LEAN: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    # Like SmolLM: tied, three query heads for each key-value head.
    "smollm": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3,
         "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}  # fmt: skip
GENERIC: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "mistral_windowed": ("mistral", {"sliding_window": 24}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 24}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    # With states in place of keys and values, in all layers or in some.
    "mamba": ("mamba", {"state_size": 8}),
    "jamba": ("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "mamba_d_state": 8}),
    # Takes no cache of transformers' at all.
    "rwkv": ("rwkv", {"attention_hidden_size": 64}),
}  # fmt: skip
# What configs of models without attention do not have.
_ATTENTION = {"num_attention_heads", "num_key_value_heads", "max_position_embeddings"}


def make_family(path: Path, name: str) -> Path:
    """Save the random model `name` of `LEAN` or `GENERIC` below `path`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, more = (LEAN | GENERIC)[name]
    tokenizer = make_tokenizer()
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    fields = _SIZES | special | more
    if architecture in {"mamba", "rwkv"}:
        fields = {key: value for key, value in fields.items() if key not in _ATTENTION}
    config = AutoConfig.for_model(architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            # Fresh norms and biases are ones and zeros, which would hide a mistake in using them.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

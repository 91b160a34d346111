"""The lean decoder made from a model that transformers has loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from core.inference.lean.decoder import Decoder, DecoderLayer, LayerShape
from core.inference.lean.linear import MakeLinear

_ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
# Those that scale their frequencies by the length of the text are not among them.
_ROTARY_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def why_not_lean(model: Any) -> str | None:
    """Return why a model cannot run as a lean decoder; `None` when it can."""
    config = model.config
    if type(model).__name__ not in _ARCHITECTURES:
        return f"{type(model).__name__} is not of the Llama family"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rotary = config.rope_parameters.get("rope_type", "default")
    if rotary not in _ROTARY_TYPES:
        return f"its rotary positions are of type {rotary}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or (
        type(model).__name__ == "MistralForCausalLM"
        and window is not None
        and window < config.max_position_embeddings
    ):
        return "its attention has a sliding window"
    if shape_of(model).head_dim % 2:
        return "its heads have an odd width"
    return None


def shape_of(model: Any) -> LayerShape:
    """Return the sizes of a model's layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LayerShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        epsilon=config.rms_norm_eps,
    )


@cache
def rotary_order(heads: int, head_dim: int) -> Tensor:
    """Return the order of a projection's outputs in which rotary pairs lie side by side.

    transformers pairs output `i` of a head with output `i + head_dim / 2`.
    """
    half = torch.arange(head_dim // 2)
    one_head = torch.stack([half, half + head_dim // 2], dim=1).flatten()
    return (torch.arange(heads).unsqueeze(1) * head_dim + one_head).flatten()


@torch.no_grad()
def build_decoder(model: Any, make_linear: MakeLinear) -> Decoder:
    """Return a decoder with a model's weights.

    Args:
        model: For which `why_not_lean` returns `None`, in float32 and on its device.
        make_linear: Makes each linear layer from weight and bias.
    """
    shape = shape_of(model)
    inner = model.model
    return Decoder(
        inner.embed_tokens.weight.detach().float(),
        [_layer(layer, shape, make_linear) for layer in inner.layers],
        make_linear(model.lm_head.weight.detach() * inner.norm.weight.detach(), None),
        frequencies=inner.rotary_emb.inv_freq.detach().float().clone(),
        rotary_scale=float(inner.rotary_emb.attention_scaling),
        heads_per_kv=shape.heads // shape.kv_heads,
        epsilon=shape.epsilon,
    ).eval()


def _layer(layer: Any, shape: LayerShape, make_linear: MakeLinear) -> DecoderLayer:
    attention, unit = layer.self_attn, layer.mlp
    before_attention = layer.input_layernorm.weight.detach()
    before_unit = layer.post_attention_layernorm.weight.detach()
    q_order = rotary_order(shape.heads, shape.head_dim)
    k_order = rotary_order(shape.kv_heads, shape.head_dim)

    def merged(parts: list[tuple[Any, Tensor | None]], norm: Tensor) -> nn.Module:
        weights, biases = [], []
        for module, order in parts:
            weight, bias = module.weight.detach(), module.bias
            weights.append(weight if order is None else weight[order])
            if bias is not None:
                biases.append(bias.detach() if order is None else bias.detach()[order])
        # The norm's weight multiplies the input, hence the columns.
        return make_linear(torch.cat(weights) * norm, torch.cat(biases) if biases else None)

    def single(module: Any) -> nn.Module:
        return make_linear(module.weight.detach(), module.bias)

    def head_norm(name: str) -> Tensor:
        norm = getattr(attention, name, None)
        if norm is None:
            return torch.zeros(0)
        weight: Tensor = norm.weight.detach().float()
        return weight[rotary_order(1, shape.head_dim)]

    return DecoderLayer(
        shape,
        qkv=merged(
            [(attention.q_proj, q_order), (attention.k_proj, k_order), (attention.v_proj, None)],
            before_attention,
        ),
        o=single(attention.o_proj),
        gate_up=merged([(unit.gate_proj, None), (unit.up_proj, None)], before_unit),
        down=single(unit.down_proj),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
    )

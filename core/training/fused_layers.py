"""Layers computed with fewer passes over memory than PEFT and transformers need, while training.

On a CPU most of what a step takes besides the matrix products is reading and writing activations.
A LoRA layer adds its update within the product (`addmm`) instead of scaling and adding whole
activations, forwards and backwards; a normalisation keeps one number per position instead of
intermediate activations. Same formulas, so the results differ by rounding only.

Outside of training, and wherever a layer is not the plain case, the modules compute as they came.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

# Normalisations that are `weight * x / rms(x)`; others of the name use `1 + weight`.
_PLAIN_NORMS = frozenset(
    {"LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
)


def fuse_layers(model: nn.Module) -> int:
    """Let the layers of a job's own model compute in fewer passes; returns how many do.

    Args:
        model: With an adapter named `default`, in float32 on the CPU.
    """
    fused = 0
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain_lora(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif type(module).__name__ in _PLAIN_NORMS and _is_plain(module.weight):
            module.forward = types.MethodType(_norm_forward, module)
        else:
            continue
        fused += 1
    return fused


def _is_plain(weight: Any) -> bool:
    return bool(weight.dtype == torch.float32 and weight.device.type == "cpu")


def _is_plain_lora(module: Any) -> bool:
    base: Any = module.base_layer
    if module.active_adapters != ["default"] or module.lora_variant:
        return False
    layers = (base, module.lora_A["default"], module.lora_B["default"])
    # Subclasses, such as those of quantised weights, compute otherwise.
    if any(type(layer) is not nn.Linear or not _is_plain(layer.weight) for layer in layers):
        return False
    return not base.weight.requires_grad and all(layer.bias is None for layer in layers[1:])


def _lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if (
        not self.training
        or self.disable_adapters
        or self.merged
        or args
        or kwargs
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
    ):
        plain: torch.Tensor = LoraLinear.forward(self, x, *args, **kwargs)
        return plain
    dropout = self.lora_dropout["default"]
    dropped = None if isinstance(dropout, nn.Identity) else dropout(x)
    base = self.base_layer
    result: torch.Tensor = _lora_product(
        x,
        dropped,
        base.weight,
        base.bias,
        self.lora_A["default"].weight,
        self.lora_B["default"].weight,
        self.scaling["default"],
    )
    return result


class _LoraProduct(torch.autograd.Function):
    """`x Wᵀ + b + s (d Aᵀ) Bᵀ`, where `d` is `x` after dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        given = rows if dropped is None else dropped.reshape(rows.shape)
        low = given @ lora_a.t()
        result = nn.functional.linear(rows, weight, bias)
        result.addmm_(low, lora_b.t(), alpha=scaling)
        ctx.save_for_backward(given, low, weight, lora_a, lora_b)
        ctx.scaling, ctx.shape, ctx.drops = scaling, x.shape, dropped is not None
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given, low, weight, lora_a, lora_b = ctx.saved_tensors
        gradient = outer[0].reshape(-1, outer[0].shape[-1])
        of_low = torch.mm(gradient, lora_b).mul_(ctx.scaling)
        of_a = torch.mm(of_low.t(), given)
        of_b = torch.mm(gradient.t(), low).mul_(ctx.scaling)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(gradient, weight)
            if not ctx.drops:
                of_x.addmm_(of_low, lora_a)
            of_x = of_x.view(ctx.shape)
        if ctx.drops and ctx.needs_input_grad[1]:
            of_dropped = torch.mm(of_low, lora_a).view(ctx.shape)
        return of_x, of_dropped, None, None, of_a, of_b, None


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor
    if not self.training or hidden_states.dtype != torch.float32 or self.weight.requires_grad:
        result = type(self).forward(self, hidden_states)
    else:
        result = _normalise(hidden_states, self.weight, self.variance_epsilon)
    return result


class _Norm(torch.autograd.Function):
    """`w x / sqrt(mean(x²) + ε)` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale = torch.linalg.vecdot(x, x).unsqueeze(-1)
        scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient = outer[0] * weight
        along = torch.linalg.vecdot(gradient, x).unsqueeze(-1)
        along = along.mul_(scale.pow(3)).div_(-x.shape[-1])
        return gradient.mul_(scale).addcmul_(x, along), None, None


# torch declares no types for it.
_lora_product: Any = _LoraProduct.apply
_normalise: Any = _Norm.apply

"""Matrix products with the base weights, one class for each way of storing them.

Activations are float32 in all of them. Rows never share a scale, so a row's result does not depend
on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Precision = Literal["float32", "fp16", "bf16"]
MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]


class Float32Linear(nn.Module):
    """Weights as they are trained: the reference.

    Args:
        weight: Shape (out, in).
        bias: Shape (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight.float().contiguous()
        self.bias = None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (rows, in) times the weights, (rows, out)."""
        return functional.linear(x, self.weight, self.bias)


class PackedFloat16Linear(nn.Module):
    """Weights in float16 as FBGEMM packs them: half the memory traffic, on x86 processors.

    Args:
        weight: Shape (out, in).
        bias: Shape (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float().contiguous(), None if bias is None else bias.float()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (rows, in) times the weights, (rows, out)."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return product


class HalfLinear(nn.Module):
    """Weights and products in a 16-bit type, as accelerators are fastest.

    Args:
        weight: Shape (out, in), of the type it shall have.
        bias: Shape (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (rows, in) times the weights, (rows, out)."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


def offered_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that a device computes in, the preferred one first."""
    if device.type != "cpu":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return ("bf16", "float32") if bf16 else ("float32",)
    return (
        ("fp16", "float32")
        if "fbgemm" in torch.backends.quantized.supported_engines
        else ("float32",)
    )


def linear_maker(precision: Precision, device: torch.device) -> MakeLinear:
    """Return what makes the linear layers of a precision.

    Raises:
        ValueError: The device does not offer it.
    """
    if precision not in offered_precisions(device):
        raise ValueError(f"{device.type} does not compute in {precision}")
    if precision == "float32":
        return Float32Linear
    if precision == "fp16":
        return PackedFloat16Linear
    return lambda weight, bias: HalfLinear(weight.to(torch.bfloat16), bias)

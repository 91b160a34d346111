"""What a job needs of a worker: an estimate of the memory that its training takes at least.

It keeps a job from a machine that cannot hold it, which would end in the kernel killing processes
there. It is made from the base model's description before any row is read, so it counts one short
row per forward pass: the memory ladder brings a larger batch down to that by itself. A dry run,
which has read the rows, asks the same function about the batch it would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.specs import JobSpec
from core.target_modules import resolve_targets

_FLOAT_BYTES = 4
_HALF_BYTES = 2
# A trained parameter, its gradient and the two moments of Adam, in float32.
_BYTES_PER_TRAINED = 4 * _FLOAT_BYTES
# Rows are seldom as long as they may be.
_MOST_TOKENS = 1024


@dataclass(frozen=True)
class Requirements:
    """What a worker must have.

    Attributes:
        device: `any`, or the only kind that will do.
        memory_bytes: At least, on CPU and MPS.
        cuda_memory_bytes: At least, on CUDA.
    """

    device: str
    memory_bytes: int
    cuda_memory_bytes: int


def estimate(spec: JobSpec, description: Mapping[str, Any]) -> Requirements:
    """Return what a job needs.

    Args:
        spec: The job.
        description: What inspection found of its base model; what is missing counts nothing.
    """
    # Of one short row per forward pass.
    tokens = min(
        spec.training.max_length, description.get("context_length", _MOST_TOKENS), _MOST_TOKENS
    )
    return Requirements(
        device=spec.resources.device,
        memory_bytes=memory_bytes(spec, description, on_cuda=False, tokens=tokens),
        cuda_memory_bytes=memory_bytes(spec, description, on_cuda=True, tokens=tokens),
    )


def memory_bytes(
    spec: JobSpec, description: Mapping[str, Any], *, on_cuda: bool, tokens: int
) -> int:
    """Return the memory of weights, trained parameters with their optimizer, and activations.

    Args:
        spec: The job.
        description: What inspection found of its base model.
        on_cuda: Where `auto` means half precision.
        tokens: In one forward pass.
    """
    half = spec.training.dtype == "bf16" or (spec.training.dtype == "auto" and on_cuda)
    weight_bytes = _HALF_BYTES if half else _FLOAT_BYTES
    shapes: Mapping[str, list[int]] = description.get("linear_modules", {})
    adapted = [shapes[name] for name in resolve_targets(spec.lora, shapes)]
    trained = sum(spec.lora.r * (rows + columns) for rows, columns in adapted)
    outputs = sum(rows for rows, _ in shapes.values())
    logits: int = description.get("vocab_size", 0)
    return (
        int(description.get("parameters", 0)) * weight_bytes
        + trained * _BYTES_PER_TRAINED
        + tokens * (outputs * weight_bytes + logits * _FLOAT_BYTES)
    )

"""What a job needs of a worker: an estimate of the memory that its training takes at least.

It keeps a job from a machine that cannot hold it, which would end in the kernel killing processes
there. It is made from the base model's description before any row is read, so it counts one short
row per forward pass: the memory ladder brings a larger batch down to that by itself. A dry run,
which has read the rows, is told the memory of the batch it would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.specs import JobSpec
from core.target_modules import resolve_targets

_FLOAT_BYTES = 4
_HALF_BYTES = 2
# NF4 with the scales of its blocks, which are quantized too.
_NF4_BYTES = 0.52
# A trained parameter, its gradient, and what the optimizer keeps of it.
_VALUES_PER_TRAINED = {"adamw_torch": 4, "adamw_torch_fused": 4, "adafactor": 2, "sgd": 2}
# Rows are seldom as long as they may be.
_MOST_TOKENS = 1024
# Measured, see docs/training.md: the trainer without model and rows; how many values are kept for
# each output of a linear module, and for each logit.
_LIBRARIES_BYTES = 580 * 1024**2
_KEPT_PER_OUTPUT = 1.5
_KEPT_PER_LOGIT = 3.0


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
    """Return the least memory of weights, trained parameters with their optimizer, and activations.

    Args:
        spec: The job.
        description: What inspection found of its base model.
        on_cuda: Where `auto` means half precision.
        tokens: In one forward pass.
    """
    shapes = _shapes(description)
    value_bytes = _value_bytes(spec, on_cuda)
    outputs = sum(rows for rows, _ in shapes.values())
    logits: int = description.get("vocab_size", 0)
    return _parameter_bytes(spec, description, on_cuda) + tokens * (
        outputs * value_bytes + logits * _FLOAT_BYTES
    )


def peak_memory_bytes(
    spec: JobSpec,
    description: Mapping[str, Any],
    *,
    on_cuda: bool,
    tokens: int,
    trained_share: float,
) -> int:
    """Return the most memory that a trainer holds, its libraries included.

    Args:
        spec: The job.
        description: What inspection found of its base model.
        on_cuda: Where `auto` means half precision.
        tokens: In one forward pass, padding included.
        trained_share: Of the tokens, those that are learnt; only they have logits.
    """
    shapes = _shapes(description)
    targets = resolve_targets(spec.lora, shapes, description.get("auto_target_modules"))
    # Trained matrices need their inputs; norms and activation functions keep what they are given.
    values = sum(shapes[name][1] for name in targets) + _KEPT_PER_OUTPUT * sum(
        rows for rows, _ in shapes.values()
    )
    if spec.training.gradient_checkpointing is True:
        # One layer's at a time, and between the layers the hidden states.
        names = [name.rsplit(".", 1)[-1] for name in shapes]
        layers = max((names.count(name) for name in names), default=1)
        width = min((columns for _, columns in shapes.values()), default=0)
        values = values / layers + layers * width
    logits = _KEPT_PER_LOGIT * trained_share * description.get("vocab_size", 0)
    per_token: float = values * _value_bytes(spec, on_cuda) + logits * _FLOAT_BYTES
    parameters = _parameter_bytes(spec, description, on_cuda)
    return _LIBRARIES_BYTES + parameters + round(tokens * per_token)


def _parameter_bytes(spec: JobSpec, description: Mapping[str, Any], on_cuda: bool) -> int:
    shapes = _shapes(description)
    value_bytes = _value_bytes(spec, on_cuda)
    targets = resolve_targets(spec.lora, shapes, description.get("auto_target_modules"))
    trained = sum(spec.lora.r * sum(shapes[name]) for name in targets)
    trained_bytes = _HALF_BYTES if spec.lora.dtype in ("bf16", "fp16") else _FLOAT_BYTES
    frozen: int = description.get("parameters", 0) * value_bytes
    if spec.training.load_in_4bit:
        linear = sum(rows * columns for rows, columns in shapes.values())
        frozen -= round(linear * (value_bytes - _NF4_BYTES))
    per_trained = trained_bytes * _VALUES_PER_TRAINED[spec.training.optim]
    return frozen + trained * per_trained


def _shapes(description: Mapping[str, Any]) -> Mapping[str, list[int]]:
    shapes: Mapping[str, list[int]] = description.get("linear_modules", {})
    return shapes


def _value_bytes(spec: JobSpec, on_cuda: bool) -> int:
    """Return the bytes of a weight and of an activation."""
    dtype = spec.training.dtype
    half = dtype in ("bf16", "fp16") or (dtype == "auto" and on_cuda)
    return _HALF_BYTES if half else _FLOAT_BYTES

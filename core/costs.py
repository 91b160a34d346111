"""What training costs in arithmetic: counted alike by the trainer, which measures its speed by it,
and by the dry run, which tells from that speed how long another job would take.

Counted are the matrix products of a causal language model. A product with a matrix of n elements
takes 2n operations per token forward and, the base being frozen, 2n backward; a trained matrix
takes 2n more for its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.specs import JobSpec, TrainingSpec
from core.target_modules import resolve_targets

# A token that is written alone costs as much as several that are read together: all weights pass
# through the memory for it. A rule of thumb.
_READ_PER_WRITTEN = 6
# Recomputing activations costs a third of the speed; small models and CPUs have memory enough.
_RECOMPUTING_FROM_PARAMETERS = 1_000_000_000
# What a pass costs besides its tokens, in tokens: the weights are read whatever their number is.
_TOKENS_PER_PASS = 100


@dataclass(frozen=True)
class ModelShape:
    """What of a base model matters here.

    Attributes:
        linear: Elements of all linear modules but the output head.
        head: Elements of the output head.
        width: Of the hidden states, times the number of layers; 0 where it is unknown.
        adapted: Sum of inputs and outputs over the adapted modules, which the rank multiplies.
    """

    linear: int
    head: int
    width: int
    adapted: int


@dataclass(frozen=True)
class Rows:
    """The rows of a training.

    Attributes:
        rows: How many.
        tokens: Their tokens.
        trained_tokens: Those among them that are learnt.
    """

    rows: int
    tokens: int
    trained_tokens: int


def shape_of(spec: JobSpec, description: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a base model and of the adapter that a spec puts on it.

    Args:
        spec: The job.
        description: What inspection found, with `linear_modules` and `vocab_size`.
    """
    shapes: Mapping[str, list[int]] = description.get("linear_modules", {})
    targets = resolve_targets(spec.lora, shapes, description.get("auto_target_modules"))
    return ModelShape(
        linear=sum(outputs * inputs for outputs, inputs in shapes.values()),
        head=int(description.get("vocab_size", 0)) * _width(shapes),
        width=_width(shapes) * _layers(shapes),
        adapted=sum(sum(shapes[name]) for name in targets),
    )


def recomputes(training: TrainingSpec, device: str, parameters: int) -> bool:
    """Tell whether activations are recomputed instead of kept, the memory ladder aside.

    Args:
        training: What the spec says.
        device: Kind of device, such as `cuda`.
        parameters: Of the model.
    """
    if training.gradient_checkpointing == "auto":
        return device != "cpu" and parameters >= _RECOMPUTING_FROM_PARAMETERS
    return training.gradient_checkpointing


def with_recomputing(spec: JobSpec, wanted: bool) -> JobSpec:
    """Return a spec that says `gradient_checkpointing` outright."""
    training = spec.training.model_copy(update={"gradient_checkpointing": wanted})
    return spec.model_copy(update={"training": training})


def training_operations(
    spec: JobSpec, shape: ModelShape, rows: Rows, *, tokens: int, passes: int
) -> float:
    """Return the operations of a training, evaluations excluded.

    Args:
        spec: The job.
        shape: Of its model.
        rows: What the rows are like.
        tokens: That go through the model.
        passes: In which they do.
    """
    if not rows.tokens:
        return 0.0
    trained = 6.0 * spec.lora.r * shape.adapted
    forward = _forward(shape, rows)
    # Activations that are not kept are computed a second time.
    times = 3 if spec.training.gradient_checkpointing is True else 2
    return (tokens + _TOKENS_PER_PASS * passes) * (times * forward + trained)


def evaluation_operations(
    spec: JobSpec,
    shape: ModelShape,
    validation: Rows,
    evaluations: int,
    *,
    training: Rows | None = None,
) -> float:
    """Return the operations of all but the steps: evaluations, report and a method's reference."""
    written = 2 * spec.evaluation.samples * spec.evaluation.max_new_tokens
    read = validation.tokens * (evaluations + 1)
    if spec.method.type == "dpo" and training is not None:
        # The reference reads all rows once, before the first step.
        read += training.tokens
    per_token = 2.0 * (shape.linear + shape.head)
    forward = _forward(shape, validation) if validation.tokens else per_token
    return read * forward + _READ_PER_WRITTEN * written * per_token


def count_evaluations(spec: JobSpec, steps: int) -> int:
    """Return how often a training evaluates; those by time cannot be known, but for the last."""
    if spec.training.eval_steps is not None:
        return math.ceil(steps / spec.training.eval_steps)
    if spec.training.eval_strategy == "time" or spec.training.max_steps is not None:
        return 1
    return math.ceil(spec.training.epochs)


def _forward(shape: ModelShape, rows: Rows) -> float:
    """Return the operations per token of one pass over rows like these."""
    learnt = rows.trained_tokens / rows.tokens
    # Each token looks at half of the row on average: once for the weights, once for the values.
    attention = 2.0 * shape.width * rows.tokens / rows.rows
    return 2.0 * (shape.linear + learnt * shape.head) + attention


def _width(shapes: Mapping[str, list[int]]) -> int:
    """Return the size of the hidden states: the commonest input of a linear module."""
    inputs = [columns for _, columns in shapes.values()]
    return max(sorted(set(inputs)), key=inputs.count, default=0)


def _layers(shapes: Mapping[str, list[int]]) -> int:
    """Return the number of layers: how often the commonest last name occurs."""
    names = [name.rsplit(".", 1)[-1] for name in shapes]
    return max((names.count(name) for name in set(names)), default=0)

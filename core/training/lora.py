"""Attach a LoRA adapter to a model and write it down."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from core.artifacts import CONFIG_FILE, WEIGHTS_FILE
from core.errors import InvalidInput
from core.specs import LoraSpec
from core.target_modules import resolve_targets
from core.training.quantization import keep_adapter_precision

_DTYPES = {
    "auto": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def auto_targets(model_type: str, linear_modules: Iterable[str]) -> list[str]:
    """Return the full names of the modules that PEFT adapts in an architecture by itself.

    Where PEFT knows none, or none of those it knows is linear, they are all.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    names = list(linear_modules)
    known = KNOWN.get(model_type, [])
    if isinstance(known, str):
        found = [name for name in names if re.fullmatch(known, name)]
    else:
        found = [name for name in names if name.rsplit(".", 1)[-1] in known]
    return found or names


def attach_lora(model: Any, spec: LoraSpec, modules: Mapping[str, list[int]], base: str) -> Any:
    """Wrap a model with a fresh, untrained adapter; the caller has seeded torch.

    Args:
        model: The job's own module objects.
        spec: Rank, scale, dropout, targets and precision.
        modules: The model's linear modules.
        base: Name of the base model, for the adapter's config.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        # Full names: PEFT's own shorthand may mean other modules than the artifact checks do.
        target_modules=resolve_targets(
            spec, modules, auto_targets(model.config.model_type, modules)
        ),
    )
    with warnings.catch_warnings():
        # PEFT asks under a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, config)
    # The same first weights at every precision but for the rounding.
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_DTYPES[spec.dtype])
    keep_adapter_precision(wrapped)
    # The name and not the path, so that the artifact is the same on every machine.
    config.base_model_name_or_path = base
    return wrapped


def begin_from(model: Any, directory: Path) -> None:
    """Give a fresh adapter the weights of a published one.

    Raises:
        InvalidInput: Code `continue_shape_mismatch`.
    """
    try:
        load_weights(model, directory / WEIGHTS_FILE)
    except ValueError as error:
        raise InvalidInput(
            "the adapter to go on from has other modules or another rank",
            code="continue_shape_mismatch",
            field="continue_from",
            hint="Give the job the adapter's rank, scale and targets.",
        ) from error


def save_lora(model: Any, directory: Path) -> None:
    """Write the adapter's weights and config as PEFT reads them, in float32."""
    save_weights(model, directory / WEIGHTS_FILE)
    model.active_peft_config.save_pretrained(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise RuntimeError(f"PEFT wrote no {CONFIG_FILE}")


def save_weights(model: Any, path: Path) -> None:
    """Write the adapter's weights under PEFT's names, in float32."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in _state(model).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(model: Any, path: Path) -> None:
    """Give the adapter the weights that `save_weights` wrote for one of the same shape.

    Raises:
        ValueError: They are those of another adapter.
    """
    from safetensors.torch import load_file

    tensors, state = load_file(path), _state(model)
    if {name: tensor.shape for name, tensor in tensors.items()} != {
        name: tensor.shape for name, tensor in state.items()
    }:
        raise ValueError(f"{path.name} holds the weights of another adapter")
    for name, tensor in state.items():
        # These are views of the parameters themselves.
        tensor.copy_(tensors[name])


def _state(model: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    # Without the setting PEFT would look for the base model on the network.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))

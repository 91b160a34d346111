"""Causal language models on disk and in memory: what training and serving have in common.

Owns the choice of the device, the loading of base weights and the names of the modules that an
adapter may modify. Imports torch: only the trainer and the engine may import this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import InvalidInput


def select_device(wanted: str) -> torch.device:
    """Return the torch device for a setting such as `auto`, `cpu`, `cuda:1` or `mps`.

    Raises:
        InvalidInput: Code `device_missing`; this machine has no such device.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise _missing(wanted) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise _missing(wanted)
    return device


def load_causal_lm(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Load a base model's directory: complete, frozen, in evaluation mode, on the CPU.

    Args:
        path: The directory.
        dtype: Precision of the weights.
        options: Further ones of `from_pretrained`.

    Raises:
        InvalidInput: Code `model_unreadable`, or `weights_incomplete` where transformers would
            fill gaps with random numbers.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreadable(path, error) from error
    lacking = sorted(report.get("missing_keys") or ())
    if lacking or report.get("mismatched_keys"):
        raise InvalidInput(
            f"the base model's weights are incomplete: {lacking[:3]}",
            code="weights_incomplete",
            hint="Download or convert the base model again.",
        )
    return model.requires_grad_(False).eval()


def linear_modules(model: Any) -> dict[str, list[int]]:
    """Return name → [out_features, in_features] of every linear module but the output head."""
    head = model.get_output_embeddings()
    return {
        name: [module.out_features, module.in_features]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def unreadable(path: Path, error: Exception) -> InvalidInput:
    """Return the error for a directory that transformers cannot load a model from."""
    return InvalidInput(
        f"{path} cannot be loaded as a causal language model: {error}",
        code="model_unreadable",
        hint="It needs config.json and safetensors weights of an architecture that transformers"
        " knows without code of the model's own.",
    )


def _missing(wanted: str) -> InvalidInput:
    return InvalidInput(
        f"this machine has no device {wanted!r}",
        code="device_missing",
        field="device",
        hint="Set TUNESMITH_DEVICE to auto, cpu, cuda, cuda:N or mps.",
    )

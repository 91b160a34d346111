"""The base model of the trainer: loaded once, lent to job after job, never changed by one.

A job gets module objects of its own that share the frozen weights. Whatever PEFT, TRL or an
exception does to modules, hooks, methods or configs is thrown away with them, so the next job
starts from exactly what a fresh process would load.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import InvalidInput, TrainingFailed
from core.inference.engine import BaseModelRef


@dataclass(frozen=True)
class _Loaded:
    digest: str
    dtype: torch.dtype
    device: torch.device
    model: Any


class WarmBase:
    """Keeps the last used base model in memory."""

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None

    def borrow(self, base: BaseModelRef, dtype: torch.dtype, device: torch.device) -> Any:
        """Return a model for one job, loading the weights unless they are here already.

        Raises:
            InvalidInput: Code `model_unreadable`.
            TrainingFailed: Code `weights_incomplete`.
        """
        kept = self._loaded
        if kept is None or (kept.digest, kept.dtype, kept.device) != (base.digest, dtype, device):
            self._loaded = kept = None
            gc.collect()
            model = load_base(Path(base.path), dtype).to(device)
            kept = self._loaded = _Loaded(base.digest, dtype, device, model)
        return share_weights(kept.model)


def load_base(path: Path, dtype: torch.dtype) -> Any:
    """Load a model directory for training: frozen, in evaluation mode, complete.

    Raises:
        InvalidInput: Code `model_unreadable`.
        TrainingFailed: Code `weights_incomplete`; transformers would fill gaps at random.
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
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreadable(path, error) from error
    lacking = sorted(report.get("missing_keys") or ())
    if lacking or report.get("mismatched_keys"):
        raise TrainingFailed(
            f"the base model's weights are incomplete: {lacking[:3]}",
            code="weights_incomplete",
            hint="Download or convert the base model again.",
        )
    return model.requires_grad_(False).eval()


def share_weights(model: nn.Module) -> Any:
    """Return a copy of a model that shares its parameters and nothing else."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


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

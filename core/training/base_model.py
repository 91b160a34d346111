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

from core.causal_lm import load_causal_lm
from core.inference.engine import BaseModelRef
from core.training.quantization import load_in_4bit


@dataclass(frozen=True)
class _Loaded:
    key: tuple[Any, ...]
    model: Any


class WarmBase:
    """Keeps the last used base model in memory."""

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None

    def borrow(
        self,
        base: BaseModelRef,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_4bit: bool = False,
    ) -> Any:
        """Return a model for one job, loading the weights unless they are here already.

        Raises:
            InvalidInput: Code `model_unreadable`, `weights_incomplete` or `bitsandbytes_missing`.
        """
        key = (base.digest, dtype, device, in_4bit)
        kept = self._loaded
        if kept is None or kept.key != key:
            self._loaded = kept = None
            gc.collect()
            path = Path(base.path)
            if in_4bit:
                model = load_in_4bit(path, dtype, device)
            else:
                model = load_causal_lm(path, dtype).to(device)
            kept = self._loaded = _Loaded(key, model)
        return share_weights(kept.model)


def share_weights(model: nn.Module) -> Any:
    """Return a copy of a model that shares its parameters and nothing else."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)

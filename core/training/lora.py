"""Attach a LoRA adapter to a model and write it down."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from core.artifacts import CONFIG_FILE, WEIGHTS_FILE
from core.errors import InvalidInput
from core.specs import LoraSpec


def resolve_targets(spec: LoraSpec, modules: Mapping[str, list[int]]) -> list[str]:
    """Return the full names of the modules that a spec adapts, in the model's order.

    A name in the spec means every module that is called so or whose path ends with it.

    Raises:
        InvalidInput: Code `unknown_target_module`; a name means no module.
    """
    if spec.target_modules == "all-linear":
        return list(modules)
    for target in spec.target_modules:
        if not any(_is_meant(target, name) for name in modules):
            endings = sorted({name.rsplit(".", 1)[-1] for name in modules})
            close = get_close_matches(target, endings, n=1)
            raise InvalidInput(
                f"the base model has no linear module {target!r}",
                code="unknown_target_module",
                field="lora.target_modules",
                hint=f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(endings)}.",
            )
    return [
        name for name in modules if any(_is_meant(target, name) for target in spec.target_modules)
    ]


def attach_lora(model: Any, spec: LoraSpec, modules: Mapping[str, list[int]], base: str) -> Any:
    """Wrap a model with a fresh, untrained adapter; the caller has seeded torch.

    Args:
        model: The job's own module objects.
        spec: Rank, scale, dropout and targets.
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
        target_modules=resolve_targets(spec, modules),
    )
    with warnings.catch_warnings():
        # PEFT asks under a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, config)
    # The name and not the path, so that the artifact is the same on every machine.
    config.base_model_name_or_path = base
    return wrapped


def save_lora(model: Any, directory: Path) -> None:
    """Write the adapter's weights and config as PEFT reads them, in float32."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Without the setting PEFT would look for the base model on the network.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    model.active_peft_config.save_pretrained(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise RuntimeError(f"PEFT wrote no {CONFIG_FILE}")


def _is_meant(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")

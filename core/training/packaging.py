"""Make the artifact directory of a trained adapter, and check that the adapter does something."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.artifacts import (
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Manifest,
    build_manifest,
)
from core.data.golden import golden_token_ids
from core.data.templates import template_of
from core.errors import TrainingFailed
from core.inference.engine import BaseModelRef
from core.training.lora import save_lora


def package_adapter(
    model: Any,
    tokenizer: Any,
    base: BaseModelRef,
    modules: Mapping[str, list[int]],
    directory: Path,
) -> Manifest:
    """Write the complete artifact and return its manifest.

    The tokenizer's files are the base model's, byte for byte, so that their hashes are equal.

    Args:
        model: The trained model with its adapter.
        tokenizer: The tokenizer it was trained with.
        base: The base model.
        modules: The base model's linear modules.
        directory: Made here; must not exist.
    """
    directory.mkdir(parents=True)
    save_lora(model, directory)
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        source = Path(base.path) / name
        if source.is_file():
            shutil.copyfile(source, directory / name)
    template = template_of(tokenizer)
    if template is not None:
        (directory / TEMPLATE_FILE).write_bytes(template.encode("utf-8"))
    return build_manifest(
        directory,
        base_digest=base.digest,
        golden_token_ids=golden_token_ids(tokenizer),
        linear_modules=modules,
    )


@torch.no_grad()
def measure_effect(model: Any, golden: list[int]) -> float:
    """Return the adapter's largest change of a logit on the golden tokens.

    Raises:
        TrainingFailed: Code `adapter_has_no_effect`; the change is zero or not a number.
    """
    tokens = torch.tensor([golden], device=model.device)
    changed = model(input_ids=tokens, use_cache=False).logits
    with model.disable_adapter():
        original = model(input_ids=tokens, use_cache=False).logits
    difference = float((changed.float() - original.float()).abs().max())
    # Written so that NaN fails too.
    if not 0 < difference < float("inf"):
        raise TrainingFailed(
            f"the trained adapter changes the base model's logits by {difference}",
            code="adapter_has_no_effect",
            hint="Raise training.learning_rate or the number of steps, or check the data.",
        )
    return difference

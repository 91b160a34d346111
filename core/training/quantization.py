"""Base weights in four bits: NF4 with double quantization (Dettmers et al., 2023), by bitsandbytes.

Only training reads the weights so; the adapter is served on the base model as it is on disk.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from core.causal_lm import load_causal_lm
from core.errors import InvalidInput


def load_in_4bit(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a base model with its linear modules in four bits, the output head excepted.

    Args:
        path: The model's directory.
        dtype: Precision of the other weights and of the products.
        device: Where the model goes.

    Raises:
        InvalidInput: Code `bitsandbytes_missing`, or what `load_causal_lm` raises.
    """
    if find_spec("bitsandbytes") is None:
        raise InvalidInput(
            "this worker has no bitsandbytes, which four-bit weights need",
            code="bitsandbytes_missing",
            field="training.load_in_4bit",
            hint="Leave the field out, or have the operator install tunesmith[4bit] there.",
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = load_causal_lm(path, dtype, quantization_config=config, device_map={"": str(device)})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # It would pack the weights anew, in place, on the first evaluation; jobs share them.
            module.support_avx512bf16_for_cpu = False
    return model


def keep_adapter_precision(model: Any) -> None:
    """Keep TRL from giving the adapter of a four-bit model other weights than the spec's."""
    if getattr(model, "is_loaded_in_4bit", False):
        # An attribute of the job's own wrapper, which hides that of the base model.
        model.is_loaded_in_4bit = False

"""An adapter of zeros, for servers that compute a row without any adapter wrongly.

vLLM up to 0.32 marks such a row on CPUs with the index -1, and takes the weights of the last of its
places for adapters when another row of the batch has an adapter
(https://github.com/vllm-project/vllm/pull/48421). With an adapter of zeros every row has a place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from core.artifacts import CONFIG_FILE, WEIGHTS_FILE


def write_neutral_adapter(directory: Path, linear_modules: Mapping[str, list[int]]) -> None:
    """Write PEFT's files of an adapter of rank 1 that changes nothing; a no-op where they are.

    Args:
        directory: Where to; it appears complete or not at all.
        linear_modules: Name → [out_features, in_features] of the base model's adaptable modules,
            of which the first one gets matrices.
    """
    if directory.is_dir():
        return
    name, (out_features, in_features) = next(iter(linear_modules.items()))
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=directory.parent))
    draft.chmod(0o755)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "bias": "none",
        "target_modules": [name],
    }
    (draft / CONFIG_FILE).write_text(json.dumps(config))
    module = f"base_model.model.{name}"
    save_file(
        {
            f"{module}.lora_A.weight": torch.zeros(1, in_features),
            f"{module}.lora_B.weight": torch.zeros(out_features, 1),
        },
        draft / WEIGHTS_FILE,
    )
    try:
        # Another process may have been faster; its files are the same.
        with suppress(OSError):
            os.rename(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
